"""What the readers of other projects' latents share: the first item, the classes, the codec, and messages.

Legend: N items, M channels of what is stored, C of a latent, h w latent cells.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.codecs import SD_SCALE
from promoe_ds.data.labelled import numbered_classes
from promoe_ds.data.latents import Latents
from promoe_ds.utils.files import in_threads

SD_CODEC = {"kind": "AutoencoderKL", "channels": 4, "factor": 8, "scale": SD_SCALE, "shift": 0.0, "stochastic": True,
            "digest": ""}  # fmt: skip
"""stabilityai/sd-vae-ft-mse, whose weights no cache names"""
UNKNOWN = {"kind": "", "factor": 0}
"""what is said of a codec that the format does not name"""
STATISTICS = {
    "repa": ((0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)),
    "edm2": ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
}
"""mean and standard deviation per channel of ImageNet's latents of that autoencoder: of pictures in [-1, 1] as iMF has
them (Lyy-iiis/imeanflow, utils/vae_util.py), and edm2's `raw_mean` and `raw_std`, of pictures in [0, 1]"""
Statistics = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]
"""mean and standard deviation per channel"""
BROKEN = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
"""what damaged files raise"""


class Cache(Latents):
    """What another project wrote. A reader finds its items, then lets this look at the first of them.

    Args:
        root: where the items lie.
        said: of the configuration; scale and shift of it count before those of the format.
        num_classes: of the model; formats that store numbers and no names have so many classes.
        classes: names, of a format that has them.
    """

    again = "write the cache again"
    names: np.ndarray
    """bytes, paths of the items below the root: a million strings would take 100 MB"""

    def __init__(
        self,
        root: Path,
        said: DataConfig,
        num_classes: int | None,
        label_N: np.ndarray,
        classes: list[str] | None = None,
        left_out: int = 0,
    ):
        self.root, self.said, self.label_B = root, said, label_N
        if not len(label_N):
            reject("data.path", root, "holds no latents", self.again)
        if classes is None:
            classes = numbered_classes(label_N, num_classes, self.where)
        shape = self.read(0, False).shape
        if len(shape) != 3 or 0 in shape or shape[0] % self.parts or shape[1] != shape[2]:
            expected = {"moments": "mean and log-variance [2C, h, h]", "mean_std": "mean and std [2C, h, h]"}
            conflict = f"holds {list(shape)}, not {expected.get(self.content, 'a latent [C, h, h]')}"
            reject("data.path", self.where(0), conflict, "name a cache of VAE latents")
        self.shape = shape  # from here on `read` compares with it
        super().__init__(classes, label_N, shape, self.record(shape[0] // self.parts), left_out)

    def record(self, channels: int) -> dict[str, Any]:
        """The codec of latents with C channels: Stable Diffusion's, or one whose scale the user says."""
        scale, shift = self.said.scale, self.said.shift
        if scale is None and channels != SD_CODEC["channels"]:
            conflict = f"{self.root} has latents of {channels} channels, not sd-vae-ft-mse's 4, and names no scale"
            reject("data.scale", "null", conflict, "set data.scale and data.shift (MAR's KL-16: 0.2325 and 0)")
        codec = SD_CODEC | {"channels": channels, "stochastic": self.parts == 2}
        if scale is not None:
            codec |= UNKNOWN | {"scale": spread("scale", scale, channels)}
        return codec if shift is None else codec | {"shift": spread("shift", shift, channels)}

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def where(self, index: int) -> str:
        return str(self.root / self.name(index))

    @abstractmethod
    def stored(self, index: int, flip: bool) -> np.ndarray:
        """As `read`, of any type and shape; raises what `BROKEN` lists."""

    def read(self, index: int, flip: bool) -> np.ndarray:
        conflict = None
        try:
            x_Mhw = in_threads(lambda: self.stored(index, flip))
        except BROKEN as error:
            reject("data.path", self.where(index), f"cannot be read ({' '.join(str(error).split())})", self.again)
        if x_Mhw.dtype.kind != "f":
            conflict = f"holds {x_Mhw.dtype}, not floats"
        elif self.shape and x_Mhw.shape != self.shape:
            conflict = f"holds {list(x_Mhw.shape)}, other files {list(self.shape)}"
        elif self.content == "mean_std" and x_Mhw.ndim == 3 and (x_Mhw[len(x_Mhw) // 2 :] < 0).any():
            conflict = "holds a standard deviation below 0: a log-variance is no standard deviation"
        if conflict:
            reject("data.path", self.where(index), conflict, self.again)
        return x_Mhw


def spread(key: str, value: float | tuple[float, ...], channels: int) -> float | list[float]:
    if isinstance(value, tuple) and len(value) != channels:
        conflict = f"has {len(value)} numbers, the latents {channels} channels"
        reject(f"data.{key}", value, conflict, "say one of each")
    if key == "scale" and not np.all(value):
        reject("data.scale", value, "0 leaves nothing of a latent", "say what the cache's own project multiplies by")
    return list(value) if isinstance(value, tuple) else value


def unlike(found: Statistics, known: Statistics) -> np.ndarray:
    """bool [C]: channels whose mean is off by half a standard deviation, or that by a factor of 2."""
    (mean, std), (mean_C, std_C) = map(np.asarray, found), map(np.asarray, known)
    return ~((abs(mean - mean_C) < std_C / 2) & (abs(np.log2(std.clip(1e-9) / std_C)) < 1))


def expected_statistics(codec: dict[str, Any]) -> Statistics | None:
    """Mean and standard deviation per channel that latents of a codec should have; None where nobody knows.

    Where a scale per channel was measured, `std` is what it makes of the standard deviation.
    """
    if "std" in codec:
        return codec["shift"], [codec["std"] / s for s in codec["scale"]]
    return STATISTICS["repa"] if codec["kind"] == SD_CODEC["kind"] and codec["channels"] == 4 else None
