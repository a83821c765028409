"""Latents as training data: the shards of `launchers/encode_latents.py`, and the official code's `.latent.npz` tree.

Both hold the moments of the codec's posterior, of every image and of its mirror image (an autoencoder does not commute
with flips). A training step draws its own sample of the posterior, keyed by (seed, step, row) as all else; the model
sees x = (z - shift) * scale.

Shape suffixes: B images, M channels of moments, C of a latent, h w latent cells.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promoe_ds.config.schema import reject
from promoe_ds.data import shards
from promoe_ds.data.codecs import SD_SCALE
from promoe_ds.data.images import list_tree

SUFFIX = ".latent.npz"
PAIRS = (("latent", "latent_flip"), ("moments", "moments_flip"))
"""arrays of an official file, and what other repositories call them: the image and its mirror image"""
SD_CODEC = {"kind": "AutoencoderKL", "channels": 4, "factor": 8, "scale": SD_SCALE, "shift": 0.0, "stochastic": True,
            "digest": ""}  # fmt: skip
"""what official files hold: unscaled moments of stabilityai/sd-vae-ft-mse, whose weights they do not name"""

Gauss = Callable[[tuple[int, ...]], np.ndarray]
"""shape [C, h, w] -> standard normal draws float32 [B, C, h, w]"""


class Latents(ABC):
    """Moments by item. `shape` is [M, h, w], `codec` the record of what made them, `left_out` as in `ClassTree`."""

    left_out = 0

    def __init__(self, classes: list[str], label_B: np.ndarray, shape: tuple[int, int, int], codec: dict[str, Any]):
        self.classes, self.label_B, self.shape, self.codec = classes, label_B, shape, codec

    def __len__(self) -> int:
        return len(self.label_B)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.shape[0] // (2 if self.codec["stochastic"] else 1)

    @property
    def image_size(self) -> int:
        """Side of a latent in cells."""
        return self.shape[1]

    @abstractmethod
    def where(self, index: int) -> str:
        """Path of item `index`, for messages."""

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
        index = shards.read_index(folder)
        items = shards.open_tensors(folder / shards.ITEMS)
        label_B = items.get_tensor("label")
        _, *shape = index.shape
        super().__init__(index.classes, label_B, (shape[0], shape[1], shape[2]), index.codec)
        if len(label_B) != index.items or sum(shard.items for shard in index.shards) != index.items:
            reject("data.path", folder, f"{shards.INDEX} and {shards.ITEMS} disagree about items", shards.AGAIN)
        self.folder, self.index, self._files = folder, index, [folder / shard.file for shard in index.shards]
        self._first = np.cumsum([0, *(shard.items for shard in index.shards)])
        self._mapped: dict[int, Any] = {}

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def where(self, index: int) -> str:
        names = shards.open_tensors(self.folder / shards.ITEMS).get_tensor("names").tobytes().decode().split("\n")
        return f"{self._files[self._shard(index)]} ({names[index]})"

    def moments(self, index: int, flip: bool) -> np.ndarray:
        number = self._shard(index)
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._map(number)
        return mapped[index - int(self._first[number]), int(flip)]

    def _map(self, number: int) -> Any:
        file = self._files[number]
        mapped = shards.open_tensors(file).get_slice("moments")
        expected = [self.index.shards[number].items, *self.index.shape]
        if mapped.get_shape() != expected:
            conflict = f"holds {mapped.get_shape()}, the index says {expected}"
            reject("data.path", file, conflict, f"remove it and {shards.AGAIN}")
        return self._mapped.setdefault(number, mapped)


class LatentTree(Latents):
    """The official code's tree: CLASS/NAME.latent.npz, moments of stabilityai/sd-vae-ft-mse at 256 pixels.

    A file an item is slow to read by the million; `launchers/encode_latents.py --from-latents` turns it into shards.

    Raises:
        ConfigError: no class folders, one without latents, or a first file that is none.
    """

    def __init__(self, root: Path):
        tree = list_tree(root, (SUFFIX,))
        self.root, self.names, self.left_out = root, tree.names, tree.left_out
        pair = self._read(0)
        shape = pair.shape[1:]
        if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
            conflict = f"holds {list(shape)}, not mean and log-variance [2C, h, h]"
            reject("data.path", root / self.names[0], conflict, "name a tree of VAE moments")
        super().__init__(tree.classes, tree.label_B, shape, SD_CODEC | {"channels": shape[0] // 2})

    def where(self, index: int) -> str:
        return str(self.root / self.names[index])

    def _read(self, index: int) -> np.ndarray:
        path = self.root / self.names[index]
        try:
            with np.load(path, allow_pickle=False) as archive:
                keys = next((pair for pair in PAIRS if set(pair) <= set(archive.files)), None)
                if keys is None:
                    raise ValueError(f"has the arrays {', '.join(archive.files)}, needs latent and latent_flip")
                return np.stack([np.asarray(archive[key], dtype=np.float32).squeeze() for key in keys])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reject("data.path", path, f"cannot be read ({' '.join(str(error).split())})", "encode the image again")

    def both(self, index: int) -> np.ndarray:
        """float32 [2, M, h, w]: moments of the image and of its mirror image. Raises `ConfigError`."""
        pair = self._read(index)
        if pair.shape[1:] != self.shape:
            conflict = f"holds {list(pair.shape[1:])}, other files {list(self.shape)}"
            reject("data.path", self.root / self.names[index], conflict, "encode the image again")
        return pair

    def moments(self, index: int, flip: bool) -> np.ndarray:
        return self.both(index)[int(flip)]


def open_latents(path: str) -> LatentShards | LatentTree:
    """A folder of shards, or an official tree, whichever `path` is; `~` is expanded.

    Raises:
        ConfigError: neither, or what the two report.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        way_out = "name the --out of launchers/encode_latents.py, or a tree of CLASS/NAME.latent.npz"
        reject("data.path", path, "is not a folder", way_out)
    if (folder / shards.INDEX).exists() or next(folder.glob("shard-*"), None) or (folder / "encoding.json").exists():
        return LatentShards(folder)
    return LatentTree(folder)
