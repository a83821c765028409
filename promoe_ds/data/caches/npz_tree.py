"""ProMoE's, MAR's and DiffMoE's latents: an npz per image, in a folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches.cache import Cache
from promoe_ds.data.images.trees import list_tree
from promoe_ds.utils.files import hidden, walk

SUFFIX = ".latent.npz"
PAIRS = (("latent", "latent_flip"), ("moments", "moments_flip"))
"""arrays of an npz: the image and its mirror image, as ProMoE calls them, and as MAR and DiffMoE do"""


class LatentTree(Cache):
    """CLASS/NAME.latent.npz of ali-vilab/ProMoE @5915b31 (`latent`, `latent_flip`), or CLASS/NAME.JPEG.npz of LTH14/mar
    main_cache.py and KwaiVGI/DiffMoE @3b7146d (`moments`, `moments_flip`): float32 [2C, h, w], mean and log-variance,
    not scaled.

    ProMoE and DiffMoE encode with sd-vae-ft-mse; MAR with KL-16, whose files name it nowhere.

    A file per item is slow to read by the million; `launchers/encode_latents.py --from-latents` turns it into shards.

    Raises:
        ConfigError: no class folders, one without latents, or a first file that is none.
    """

    again = "encode the image again"

    def __init__(self, root: Path, said: DataConfig | None = None, num_classes: int | None = None):
        classes, names, label_N, left_out = list_tree(root, (".npz",))
        official = sum(name.endswith(SUFFIX) for name in names)
        if official not in (0, len(names)):
            conflict = f"{official} files end in {SUFFIX}, {len(names) - official} do not: two caches in one tree"
            reject("data.path", root, conflict, "keep one of them there")
        self.names = np.array([os.fsencode(name) for name in names])
        super().__init__(root, said or DataConfig(), num_classes, label_N, classes, left_out)

    @staticmethod
    def finds(path: Path) -> bool:
        with os.scandir(path) as entries:  # unlike Path.is_dir, it asks the disk about links alone
            classes = [entry.path for entry in entries if entry.is_dir() and not hidden(entry.name)]
        return any(files for folder in classes for _, files, _ in walk(folder, (".npz",)))

    def stored(self, index: int, flip: bool) -> np.ndarray:
        with np.load(self.where(index), allow_pickle=False) as archive:
            keys = next((pair for pair in PAIRS if set(pair) <= set(archive.files)), None)
            if keys is None:
                raise ValueError(f"has the arrays {', '.join(archive.files)}, needs latent and latent_flip")
            return np.asarray(archive[keys[flip]]).squeeze()
