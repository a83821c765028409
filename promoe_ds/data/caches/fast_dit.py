"""fast-DiT's latents: scaled samples and labels in numbered files."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches.cache import BROKEN, Cache
from promoe_ds.utils.files import in_threads

IMAGENET = 1_281_167
"""pictures of ImageNet-1k's training part"""


class FastDiT(Cache):
    """imagenet256_features/N.npy float32 [1, 4, h, w] and imagenet256_labels/N.npy int64 [1] of chuanyangjin/fast-DiT,
    extract_features.py: samples of sd-vae-ft-mse's posterior times 0.18215, some of them of the mirror image.

    Every rank that extracted counted N from 0 and overwrote the others' files: a count that looks so is said.

    Raises:
        ConfigError: features and labels do not pair, a number is missing, or a label is none.
    """

    content, flips, again = "scaled_sample", 1, "extract the features again, with one process"

    def __init__(self, root: Path, said: DataConfig, num_classes: int | None = None):
        features = sorted(root.glob("*_features")) or [root / "imagenet256_features"]
        if len(features) > 1:
            names = " and ".join(folder.name for folder in features)
            reject("data.path", root, f"holds {names}", "move one of them elsewhere")
        self.labels = root / features[0].name.replace("_features", "_labels")
        counts = [self._count(folder) for folder in (features[0], self.labels)]
        if counts[0] != counts[1]:
            conflict = f"holds {counts[0]} features and {counts[1]} labels"
            reject("data.path", root, conflict, self.again)
        ranks = max(1, round(IMAGENET / max(1, counts[0])))
        if 1 < ranks <= 256 and counts[0] == -(-IMAGENET // ranks):
            part = f"its {counts[0]:,} items are 1/{ranks} of ImageNet's {IMAGENET:,}"
            self.note = f"{part}: {ranks} extracting processes overwrote each other's files"
        with ThreadPoolExecutor(thread_name_prefix="labels") as pool:
            parts = pool.map(self._read_labels, range(0, counts[0], 4096), repeat(counts[0]))
            label_N = np.concatenate([np.empty(0, np.int64), *parts])
        super().__init__(features[0], said, num_classes, label_N)

    @staticmethod
    def finds(path: Path) -> bool:
        return any((path / f.name.replace("_features", "_labels")).is_dir() for f in path.glob("*_features"))

    def _count(self, folder: Path) -> int:
        """Of the files 0.npy, 1.npy, ...; none may be missing."""
        try:
            names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".npy")}
        except OSError as error:
            reject("data.path", folder, f"cannot be listed ({error.strerror})", "name the folder above it")
        missing = next((n for n in range(len(names)) if f"{n}.npy" not in names), None)
        if missing is not None:
            reject("data.path", folder, f"has {len(names)} files and no {missing}.npy", self.again)
        return len(names)

    def _read_labels(self, first: int, count: int) -> np.ndarray:
        """Labels of 4,096 items. All files but for the number are the same bytes, which is 20 times faster to read."""
        head, label_n = None, np.empty(min(4096, count - first), np.int64)
        for row in range(len(label_n)):
            path = f"{self.labels}/{first + row}.npy"
            try:
                file = os.open(path, os.O_RDONLY)
                data = os.read(file, 512)
                os.close(file)
                if data[:-8] != head:
                    label = in_threads(partial(_loaded, data))
                    if label.dtype != np.int64 or label.size != 1:
                        raise ValueError(f"it holds {label.dtype} {list(label.shape)}")
                    head = data[:-8]
            except BROKEN as error:
                reject("data.path", path, f"is not a label ({' '.join(str(error).split())})", self.again)
            label_n[row] = int.from_bytes(data[-8:], "little", signed=True)
        return label_n

    def name(self, index: int) -> str:
        return f"{index}.npy"

    def stored(self, index: int, flip: bool) -> np.ndarray:
        x_1Chw = np.load(self.where(index), allow_pickle=False)
        return x_1Chw[0] if x_1Chw.shape[:1] == (1,) else x_1Chw


def _loaded(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
