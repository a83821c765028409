"""Conditional routing (paper Sec. 4.1): images with a label go to the router, those without to unconditional experts.

Here a batch is sorted, images with a label first. The model keeps its images in that order, so that in `layer.py`
conditional routing is a slice: no mask, no copy and no device synchronisation in any layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """What the MoE layers and their routers know of a batch; tensors are int64 [B] on the model's device."""

    label_B: Tensor
    """in the model's order"""
    order_B: Tensor
    """the model's order from the caller's"""
    restore_B: Tensor
    """the caller's order from the model's"""
    num_conditional: int
    """I: the first I images of the model's order carry a real label"""
    row_B: Tensor
    """in the model's order: the image's place in the global batch"""


def split_by_label(y_B: Tensor, null_label: int, device: torch.device | str, row_B: Tensor | None = None) -> Split:
    """Sort a batch by whether an image has a label.

    Args:
        y_B: integers [B]. On the host the split waits for nothing; from a device they are copied to the host once.
        null_label: the label of classifier-free guidance's unconditional images.
        device: where the model runs.
        row_B: int64 [B] on the host, places in the global batch; 0..B-1 if not given.
    """
    label_B = y_B.numpy(force=True).astype(np.int64)
    null_B = label_B == null_label
    order_B = null_B.argsort(kind="stable")
    places_B = np.arange(len(label_B)) if row_B is None else row_B.numpy()
    label, order, restore, row = (
        _sent(x, torch.device(device)) for x in (label_B[order_B], order_B, order_B.argsort(), places_B[order_B])
    )
    return Split(label, order, restore, int((~null_B).sum()), row)


def _sent(x: np.ndarray, device: torch.device) -> Tensor:
    """Only from pinned memory does the host not wait for the copy."""
    host = torch.from_numpy(x)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
