"""Latents as training data: the shards of `launchers/encode_latents.py`, and the official code's `.latent.npz` tree.

Both hold the moments of the codec's posterior, of every image and of its mirror image (an autoencoder does not commute
with flips). A training step draws its own sample of the posterior, keyed by (seed, step, row) as all else; the model
sees x = (z - shift) * scale.

Another layout is another subclass of `Latents`, which says where an item is and what its moments are; `open_latents`
finds it by what lies at the path.

Shape suffixes: B images, M channels of moments, C of a latent, h w latent cells.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promoe_ds.config.schema import reject
from promoe_ds.data import shards
from promoe_ds.data.codecs import SD_SCALE
from promoe_ds.data.dataset import Gauss, ImageDataset
from promoe_ds.data.images import list_tree

SUFFIX = ".latent.npz"
PAIRS = (("latent", "latent_flip"), ("moments", "moments_flip"))
"""arrays of an official file, and what other repositories call them: the image and its mirror image"""
SD_CODEC = {"kind": "AutoencoderKL", "channels": 4, "factor": 8, "scale": SD_SCALE, "shift": 0.0, "stochastic": True,
            "digest": ""}  # fmt: skip
"""what official files hold: unscaled moments of stabilityai/sd-vae-ft-mse, whose weights they do not name"""


class Latents(ImageDataset):
    """Moments by item.

    Args:
        shape: (M, h, w) of an item.
        codec: the record of what made them.
    """

    unit = "cells"
    shape: tuple[int, ...]

    def __init__(
        self, classes: list[str], label_B: np.ndarray, shape: tuple[int, ...], codec: dict[str, Any], left_out: int = 0
    ):
        channels = shape[0] // 2 if codec["stochastic"] else shape[0]
        super().__init__(classes, label_B, channels, shape[1], left_out)
        self.shape, self.codec = shape, codec

    @abstractmethod
    def moments(self, index: int, flip: bool) -> np.ndarray:
        """[M, h, w], unscaled, of any float type. Raises `ConfigError` where the item is missing or damaged."""

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
            x_BMhw[row] = self.moments(index, flip)
        if self.codec["stochastic"]:  # z = mean + exp(log variance / 2) * gauss, clamped as diffusers does
            mean, logvar = np.split(x_BMhw, 2, axis=1)
            x_BMhw = mean + np.exp(0.5 * logvar.clip(-30, 20)) * gauss(mean.shape[1:])
        x_BMhw -= np.float32(self.codec["shift"])
        x_BMhw *= np.float32(self.codec["scale"])
        return torch.from_numpy(x_BMhw), label_B

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As `draw`, unflipped, with the mean of the posterior."""
        return self.draw(indices, np.zeros(len(indices), bool), lambda shape: np.zeros((len(indices), *shape), "f4"))


class LatentShards(Latents):
    """A folder of shards, mapped into memory when they are first read.

    Raises:
        ConfigError: no complete index, or files that do not agree with it.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, shards.read_index(folder)
        label_B = shards.open_tensors(folder / shards.ITEMS).get_tensor("label")
        super().__init__(self.index.classes, label_B, tuple(self.index.shape[1:]), self.index.codec)
        self._first = np.cumsum([0, *(shard.items for shard in self.index.shards)])
        """number of the first item of each shard"""
        if not len(label_B) == self._first[-1] == self.index.items:
            reject("data.path", folder, f"{shards.INDEX} and {shards.ITEMS} disagree about items", shards.AGAIN)
        self._mapped: dict[int, Any] = {}

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def where(self, index: int) -> str:
        names = shards.open_tensors(self.folder / shards.ITEMS).get_tensor("names").tobytes().decode().split("\n")
        return f"{self.folder / self.index.shards[self._shard(index)].file} ({names[index]})"

    def moments(self, index: int, flip: bool) -> np.ndarray:
        number = self._shard(index)
        if number not in self._mapped:  # two threads may both map a shard, which does no harm
            shard = self.index.shards[number]
            file, expected = self.folder / shard.file, [shard.items, *self.index.shape]
            mapped = shards.open_tensors(file).get_slice("moments")
            if mapped.get_shape() != expected:
                conflict = f"holds {mapped.get_shape()}, the index says {expected}"
                reject("data.path", file, conflict, f"remove it and {shards.AGAIN}")
            self._mapped[number] = mapped
        return self._mapped[number][index - int(self._first[number]), int(flip)]


class LatentTree(Latents):
    """The official code's tree: CLASS/NAME.latent.npz, moments of stabilityai/sd-vae-ft-mse at 256 pixels.

    A file per item is slow to read by the million; `launchers/encode_latents.py --from-latents` turns it into shards.

    Raises:
        ConfigError: no class folders, one without latents, or a first file that is none.
    """

    shape = ()
    """of the first file, once it is read"""

    def __init__(self, root: Path):
        self.root = root
        classes, self.names, label_B, left_out = list_tree(root, (SUFFIX,))
        shape = self.load(0).shape[1:]
        if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
            conflict = f"holds {list(shape)}, not mean and log-variance [2C, h, h]"
            reject("data.path", self.where(0), conflict, "name a tree of VAE moments")
        super().__init__(classes, label_B, shape, SD_CODEC | {"channels": shape[0] // 2}, left_out)

    def name(self, index: int) -> str:
        return self.names[index]

    def where(self, index: int) -> str:
        return str(self.root / self.names[index])

    def load(self, index: int) -> np.ndarray:
        """float32 [2, M, h, w]: moments of the image and of its mirror image. Raises `ConfigError`."""
        try:
            with np.load(self.where(index), allow_pickle=False) as archive:
                keys = next((pair for pair in PAIRS if set(pair) <= set(archive.files)), None)
                if keys is None:
                    raise ValueError(f"has the arrays {', '.join(archive.files)}, needs latent and latent_flip")
                pair = np.stack([np.asarray(archive[key], dtype=np.float32).squeeze() for key in keys])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            conflict = f"cannot be read ({' '.join(str(error).split())})"
            reject("data.path", self.where(index), conflict, "encode the image again")
        if self.shape and pair.shape[1:] != self.shape:
            conflict = f"holds {list(pair.shape[1:])}, other files {list(self.shape)}"
            reject("data.path", self.where(index), conflict, "encode the image again")
        return pair

    def moments(self, index: int, flip: bool) -> np.ndarray:
        return self.load(index)[int(flip)]


def open_latents(path: str) -> LatentShards | LatentTree:
    """A folder of shards, or an official tree, whichever `path` is; `~` is expanded.

    Raises:
        ConfigError: neither, or what the two report.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        way_out = "name the --out of launchers/encode_latents.py, or a tree of CLASS/NAME.latent.npz"
        reject("data.path", path, "is not a folder", way_out)
    if any(folder.glob("shard-*")) or (folder / shards.INDEX).exists() or (folder / "encoding.json").exists():
        return LatentShards(folder)
    return LatentTree(folder)
