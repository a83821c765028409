"""REPA's and edm2's latents: numbered arrays with dataset.json, in a folder or a zip."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config.schema import DataConfig, reject
from promoe_ds.data.caches.cache import BROKEN, STATISTICS, Cache, unlike
from promoe_ds.data.zips import StoredZip
from promoe_ds.utils.files import walk


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
    LABELS = "dataset.json"

    def __init__(self, path: Path, said: DataConfig, num_classes: int | None = None):
        self.root = path / "vae-sd" if (path / "vae-sd" / self.LABELS).is_file() else path
        self._zip = None if self.root.is_dir() else StoredZip(self.root)
        self.names, label_N = self._labelled()
        found = self._zip.names if self._zip else np.array(sorted(self._listed()) or [b""])
        found = found[np.char.endswith(found, b".npy")]
        if not np.array_equal(found, self.names):
            odd = [*np.setdiff1d(self.names, found), *np.setdiff1d(found, self.names), b"a name that it has twice"][0]
            conflict = f"its {self.LABELS} and its files disagree about {odd.decode()}"
            reject("data.path", self.root, conflict, self.again)
        super().__init__(self.root, said, num_classes, label_N)

    @classmethod
    def finds(cls, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".zip"
        folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path
        return (folder / cls.LABELS).is_file() and any(folder.glob("*/*.npy"))

    def _listed(self) -> Iterator[bytes]:
        for parent, files, _ in walk(self.root, (".npy",)):
            prefix = Path(parent).relative_to(self.root).as_posix()
            yield from (os.fsencode(f"{prefix}/{name}") for name in files)

    def _labelled(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted names as bytes, and their labels."""
        where = f"{self.root} ({self.LABELS})" if self._zip else self.root / self.LABELS
        try:
            text = self._zip.read(self.LABELS.encode()) if self._zip else (self.root / self.LABELS).read_bytes()
            pairs = json.loads(text)["labels"]
            names, labels = np.array([name.encode() for name, _ in pairs]), np.array([label for _, label in pairs])
            if labels.dtype.kind not in "iu" or labels.ndim != 1:
                raise ValueError("its labels are not integers")
        except (*BROKEN, TypeError, AttributeError) as error:
            conflict = f"is not names and labels ({type(error).__name__}: {' '.join(str(error).split())})"
            reject("data.path", where, conflict, "write the cache again, from pictures with labels")
        order = np.argsort(names, kind="stable")
        return names[order], labels[order].astype(np.int64)

    def where(self, index: int) -> str:
        return f"{self.root} ({self.name(index)})" if self._zip else super().where(index)

    def stored(self, index: int, flip: bool) -> np.ndarray:
        data = self._zip.read(self.names[index]) if self._zip else Path(self.where(index)).read_bytes()
        return np.load(io.BytesIO(data), allow_pickle=False)

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
