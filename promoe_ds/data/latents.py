"""Latents as training data: what a source of them is, and the shards of `launchers/encode_latents.py`.

A source says what lies where an item is (its *content*) and which codec made it. Whatever the source, the model sees
x = (z - shift) * scale, where z is a sample of the codec's posterior: drawn by the training step, keyed by (seed, step,
row) as all else, or drawn once and for all by whoever wrote the cache. `caches/` reads what other projects wrote.

Shape suffixes: B images, M channels of what is stored, C of a latent, h w latent cells.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from promoe_ds.config.errors import reject
from promoe_ds.data import shards
from promoe_ds.data.codecs import per_channel
from promoe_ds.data.dataset import Gauss, ImageDataset, located
from promoe_ds.data.labelled import check_labels

Content = Literal["moments", "mean_std", "sample", "scaled_sample"]
"""What is stored of an item:

moments: mean and log-variance of the posterior, M = 2C.
mean_std: its mean and standard deviation, M = 2C.
sample: one draw of it, or the one point of a codec without a posterior, M = C.
scaled_sample: (sample - shift) * scale, M = C.
"""


class Latents(ImageDataset):
    """Latents by item.

    Args:
        shape: (M, h, w) of an item.
        codec: the record of what made them; decoding inverts its scale and shift.

    Attributes:
        content: what `read` gives.
        flips: 2 where the mirror image of each item is stored too (an autoencoder does not commute with flips), else 1.
    """

    unit = "cells"
    codec: dict[str, Any]
    content: Content = "moments"
    flips = 2
    shape: tuple[int, ...] = ()

    def __init__(
        self, classes: list[str], label_B: np.ndarray, shape: tuple[int, ...], codec: dict[str, Any], left_out: int = 0
    ):
        super().__init__(classes, label_B, shape[0] // self.parts, shape[1], left_out)
        self.shape, self.codec = shape, codec

    @property
    def parts(self) -> int:
        """M / C: 2 where a posterior is stored, 1 where a point is."""
        return 2 if self.content in ("moments", "mean_std") else 1

    @abstractmethod
    def name(self, index: int) -> str:
        """What tells item `index` from the others, wherever the data set lies."""

    @abstractmethod
    def read(self, index: int, flip: bool) -> np.ndarray:
        """[M, h, w], of any float type. Raises `ConfigError` where the item is missing or damaged."""

    def draw(self, indices: np.ndarray, flip_B: np.ndarray, gauss: Gauss) -> tuple[torch.Tensor, torch.Tensor]:
        """A sample of the posterior of each item, scaled: float32 [B, C, h, w], and labels int64 [B].

        Args:
            flip_B: bool; the mirror image's latent where true.
            gauss: called only if there is a posterior to sample.

        Raises:
            ConfigError: an item is missing or damaged.
            IndexError: an index is outside the data set.
        """
        label_B = torch.from_numpy(self.label_B[indices])
        x_BMhw = np.empty((len(indices), *self.shape), dtype=np.float32)
        for row, (index, flip) in enumerate(zip(indices.tolist(), flip_B.tolist(), strict=True)):
            x_BMhw[row] = self.read(index, flip)
        if self.parts == 2:  # z = mean + std * gauss; a log-variance is clamped as diffusers does
            mean, spread = np.split(x_BMhw, 2, axis=1)
            std = np.exp(0.5 * spread.clip(-30, 20)) if self.content == "moments" else spread
            x_BMhw = mean + std * gauss(mean.shape[1:])
        if self.content != "scaled_sample":
            x_BMhw -= per_channel(self.codec["shift"])
            x_BMhw *= per_channel(self.codec["scale"])
        return torch.from_numpy(x_BMhw), label_B

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As `draw`, unflipped, with the mean of the posterior."""
        return self.draw(indices, np.zeros(len(indices), bool), lambda shape: np.zeros((len(indices), *shape), "f4"))

    def load(self, index: int) -> np.ndarray:
        """What shards keep of an item: float32 [flips, M, h, w], unscaled moments or points. Raises `ConfigError`."""
        x_FMhw = np.stack([np.asarray(self.read(index, bool(flip)), np.float32) for flip in range(self.flips)])
        if self.content == "mean_std":
            mean, std = np.split(x_FMhw, 2, axis=1)
            return np.concatenate([mean, 2 * np.log(std.clip(np.exp(-15.0)))], axis=1, dtype=np.float32)
        if self.content == "scaled_sample":
            return x_FMhw / per_channel(self.codec["scale"]) + per_channel(self.codec["shift"])
        return x_FMhw


class LatentShards(Latents):
    """A folder of shards, mapped into memory when they are first read.

    Raises:
        ConfigError: no complete index, or files that do not agree with it.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, shards.read_index(folder)
        self.flips, self.content = self.index.shape[0], "moments" if self.index.codec["stochastic"] else "sample"
        label_B = shards.open_tensors(folder / shards.ITEMS).get_tensor("label")
        super().__init__(self.index.classes, label_B, tuple(self.index.shape[1:]), self.index.codec)
        self._first = np.cumsum([0, *(shard.items for shard in self.index.shards)])
        """number of the first item of each shard"""
        if not len(label_B) == self._first[-1] == self.index.items:
            reject("data.path", folder, f"{shards.INDEX} and {shards.ITEMS} disagree about items", shards.AGAIN)
        check_labels(label_B, self.num_classes, self.where, f"restore {shards.INDEX}, or {shards.AGAIN}")
        self._mapped: dict[int, Any] = {}

    def name(self, index: int) -> str:
        return shards.open_tensors(self.folder / shards.ITEMS).get_tensor("names").tobytes().decode().split("\n")[index]

    def where(self, index: int) -> str:
        return f"{self.folder / self.index.shards[located(self._first, index)[0]].file} ({self.name(index)})"

    def read(self, index: int, flip: bool) -> np.ndarray:
        number, row = located(self._first, index)
        if number not in self._mapped:  # two threads may both map a shard, which does no harm
            self._mapped[number] = shards.open_moments(self.folder, self.index, self.index.shards[number])
        return self._mapped[number][row, int(flip)]
