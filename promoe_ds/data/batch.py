"""One micro-batch.

Shape suffixes: B images of a micro-batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank: CPU tensors, everything random already drawn."""

    x_BCHW: torch.Tensor
    """float32 in [-1, 1], or scaled latents, after random flips; of `CodedImages` uint8 pixels [B, H, W, 3] until
    `StepEncoder` has them"""
    label_B: torch.Tensor
    """int64 after label drop; `model.num_classes` is the null label"""
    noise_BCHW: torch.Tensor
    """float32, standard normal"""
    gauss_B: torch.Tensor
    """float32, standard normal; the objective turns it into timesteps"""
    rows: torch.Tensor
    """int64 [B], positions in the global batch"""
    posterior_BCHW: torch.Tensor | None = None
    """float32, standard normal, of the posteriors of pixels that are yet to be encoded"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field, those that are there."""
        return {f.name: x for f in dataclasses.fields(self) if (x := getattr(self, f.name)) is not None}

    def arrays(self) -> dict[str, np.ndarray]:
        """The same memory as NumPy sees it, for another process."""
        return {name: x.numpy() for name, x in self.tensors().items()}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Batch:
        """The way back from `arrays`."""
        return Batch(**{name: torch.from_numpy(x) for name, x in arrays.items()})

    def copy(self, pin: bool) -> Batch:
        """In memory of its own; pinned is that from which a GPU copies while the host goes on."""
        return Batch(**{name: x.pin_memory() if pin else x.clone() for name, x in self.tensors().items()})
