"""LightningDiT's latents: safetensors of samples, with statistics beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data import shards
from promoe_ds.data.caches.cache import SD_CODEC, UNKNOWN, Cache, spread
from promoe_ds.data.dataset import located
from promoe_ds.utils.tensors import load_tensors


class LightningDiT(Cache):
    """latents_rank00_shard000.safetensors, ... of hustvl/LightningDiT @2725fed, extract_features.py: `latents` and
    `latents_flip` float32 [n, C, h, w], samples of the posterior as they left the codec, and `labels` int64 [n].

    Its reader sees (z - mean) / std * latent_multiplier, mean and std per channel from latents_stats.pt. The multiplier
    is 1 in the VA-VAE recipe; `data.scale` is another. With `data.shift` the statistics are not read (`latent_norm:
    false` is `data.shift=0`).

    Raises:
        ConfigError: files that are damaged or do not agree, or no statistics.
    """

    content, again = "sample", "extract the features again"
    KEYS = ("latents", "latents_flip")
    PATTERN, STATS = "latents_rank*_shard*.safetensors", "latents_stats.pt"

    def __init__(self, root: Path, said: DataConfig, num_classes: int | None = None):
        self.files, labels = sorted(root.glob(self.PATTERN)), [np.empty(0, np.int64)]
        self._opened: dict[int, Any] = {}
        for number, file in enumerate(self.files):
            tensors = self._open(number)
            if not {*self.KEYS, "labels"} <= set(tensors.keys()):
                conflict = f"holds {', '.join(tensors.keys())}, not labels, latents, latents_flip"
                reject("data.path", file, conflict, self.again)
            shapes, label_n = [tensors.get_slice(key).get_shape() for key in self.KEYS], tensors.get_tensor("labels")
            if shapes[0] != shapes[1] or label_n.shape != (shapes[0][0],) or label_n.dtype.kind not in "iu":
                labelled = f"labels {label_n.dtype} {list(label_n.shape)}"
                conflict = f"latents {shapes[0]}, latents_flip {shapes[1]} and {labelled} disagree"
                reject("data.path", file, conflict, self.again)
            labels.append(label_n.astype(np.int64))
        self._first = np.cumsum([len(part) for part in labels])
        """number of the first item of each file"""
        super().__init__(root, said, num_classes, np.concatenate(labels))

    @classmethod
    def finds(cls, path: Path) -> bool:
        return any(path.glob(cls.PATTERN))

    def _open(self, number: int) -> Any:
        if number not in self._opened:  # two threads may both open a file, which does no harm
            self._opened[number] = shards.open_tensors(self.files[number], again=self.again)
        return self._opened[number]

    def name(self, index: int) -> str:
        number, row = located(self._first, index)
        return f"{self.files[number].name}/{row}"

    def where(self, index: int) -> str:
        number, row = located(self._first, index)
        return f"{self.files[number]} (item {row})"

    def stored(self, index: int, flip: bool) -> np.ndarray:
        number, row = located(self._first, index)
        return self._open(number).get_slice(self.KEYS[flip])[row]

    def record(self, channels: int) -> dict[str, Any]:
        if self.said.shift is not None:
            return super().record(channels) | UNKNOWN
        path = self.root / self.STATS
        multiplier = 1.0 if self.said.scale is None else spread("scale", self.said.scale, channels)
        if isinstance(multiplier, list):
            reject("data.scale", multiplier, "latent_multiplier is one number", "say one, or data.shift too")
        try:
            stats = load_tensors(path)
            mean, std = (stats[key].double().reshape(channels).numpy() for key in ("mean", "std"))
            if not (np.isfinite(mean).all() and (std > 0).all()):
                raise ValueError("its values are not finite, or a std is not above 0")
        except FileNotFoundError:
            way_out = "copy it there, or set data.scale and data.shift=0 for latent_norm: false"
            reject("data.path", path, "does not exist, and only it says mean and std per channel", way_out)
        except Exception as error:  # what is no dictionary of tensors raises anything
            conflict = f"is not mean and std of {channels} channels ({' '.join(str(error).split())[:200]})"
            reject("data.path", path, conflict, "copy it again")
        codec = SD_CODEC | UNKNOWN | {"channels": channels, "stochastic": False, "std": float(multiplier)}
        return codec | {"scale": (multiplier / std).tolist(), "shift": mean.tolist()}
