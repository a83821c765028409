"""REPA's and edm2's latents: numbered arrays with dataset.json, in a folder or a zip."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches.cache import STATISTICS, Cache, unlike
from promoe_ds.data.labelled import LABELS, LabelledFiles


class MeanStd(Cache):
    """NNNNN/img-mean-std-NNNNNNNN.npy float32 [8, h, w], mean and standard deviation (no log-variance), and
    dataset.json with the labels; in a folder or an uncompressed zip. Two projects write this, with sd-vae-ft-mse:

    sihyun-yu/REPA @67f7145, preprocessing/dataset_tools.py: of pictures in [-1, 1]; scale 0.18215. The path is vae-sd,
        or the folder above, which holds images/ too.
    NVlabs/edm2 @4bf8162, dataset_tool.py: of pictures in [0, 1]; per channel to mean 0 and standard deviation 0.5.

    `data.format` says which; without it the mean and standard deviation of the means do.

    Raises:
        ConfigError: no dataset.json, one without labels or that does not agree with the files, or neither's statistics.
    """

    content, flips = "mean_std", 1

    def __init__(self, path: Path, said: DataConfig, num_classes: int | None = None):
        self.root = path / "vae-sd" if (path / "vae-sd" / LABELS).is_file() else path
        self._files = LabelledFiles(self.root, (".npy",), self.again)
        self.names = self._files.names
        super().__init__(self.root, said, num_classes, self._files.label_N, left_out=self._files.left_out)

    @staticmethod
    def finds(path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".zip"
        folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path
        return (folder / LABELS).is_file() and any(folder.glob("*/*.npy"))

    def where(self, index: int) -> str:
        return self._files.where(index)

    def stored(self, index: int, flip: bool) -> np.ndarray:
        return np.load(io.BytesIO(self._files.read(index)), allow_pickle=False)

    def record(self, channels: int) -> dict[str, Any]:
        codec, kind = super().record(channels), self.said.format or self._told(channels)
        if kind == "edm2":
            codec |= {"pixel_range": [0.0, 1.0]}
            if self.said.scale is None:
                if self.said.shift is not None:
                    reject("data.shift", self.said.shift, "edm2's scale belongs to its own shift", "say data.scale too")
                mean, std = STATISTICS[kind]
                codec |= {"scale": [0.5 / s for s in std], "shift": list(mean), "std": 0.5}
        return codec

    def _told(self, channels: int) -> str:
        """repa or edm2, by what the means are like. Raises `ConfigError` if they are like neither's."""
        chosen = np.linspace(0, len(self) - 1, min(256, len(self))).astype(int)
        x_NChw = np.stack([self.read(index, False)[:channels] for index in chosen.tolist()]).astype(np.float64)
        mean, std = x_NChw.mean((0, 2, 3)), x_NChw.std((0, 2, 3))
        found = f"average {np.round(mean, 2).tolist()}, std {np.round(std, 2).tolist()}"
        for kind, known in STATISTICS.items():
            if channels == len(known[0]) and not unlike((mean, std), known).any():
                self.note = f"read as data.format={kind}, because its means ({found}) are like those"
                return kind
        conflict = f"REPA and edm2 use the same names, and these means ({found}) are like neither's"
        way_out = "set data.format=repa (of pictures in [-1, 1]) or data.format=edm2 (in [0, 1])"
        reject("data.path", self.root, conflict, way_out)
