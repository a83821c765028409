"""Features instead of pictures: where a sampler puts its images when only scores are wanted.

A batch becomes a small .safetensors file of features, spatial features, logits and digests, named after its first
image; when all images are made, `pack` turns the files into one, as `launchers/evaluate.py features` writes it.
50,000 images at 256 pixels take 0.8 GB on the way and 0.6 GB in the end, instead of 9.8 GB.

Shape suffixes: N images, H W pixels, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from promoe_ds.evaluation.collect import FeatureSet, save_features
from promoe_ds.evaluation.features import FeatureExtractor
from promoe_ds.evaluation.images import Images, Labels, digests
from promoe_ds.evaluation.metrics import gaussian_statistics
from promoe_ds.utils.files import atomic

PACKED = "features.safetensors"
PICTURES = 100
"""first images that are kept as pictures, for a grid"""


class FeatureStore:
    """`made-*.safetensors` in the folder `out`; what is on disk is looked at when the store is made.

    Batches pass through the extractor as they are written.
    """

    def __init__(self, out: Path, extractor: FeatureExtractor):
        self._out, self._extractor = out, extractor
        self._made = {index for rows in self._files("index") for index in rows["index"].tolist()}

    def _files(self, *keys: str) -> Iterator[dict[str, np.ndarray]]:
        """Those of each file's arrays that it has. Damaged files, and another extractor's, are passed over."""
        for path in sorted(self._out.glob("made-*.safetensors")):
            try:
                with safetensors.safe_open(path, "numpy") as file:
                    if (file.metadata() or {}).get("extractor") != self._extractor.name:
                        continue
                    rows = {key: file.get_tensor(key) for key in keys if key in file.keys()}  # noqa: SIM118
            except (safetensors.SafetensorError, OSError):
                continue
            yield rows

    def read(self, index: int) -> np.ndarray | None:
        """Something, if image `index` has been counted; None if it must be made."""
        return np.empty(0, np.uint8) if index in self._made else None

    def write(self, indices: np.ndarray, images_NHWC: Images) -> None:
        """Extract a finished batch; its file is whole or absent."""
        size = self._extractor.batch
        parts = [self._extractor.extract(images_NHWC[i : i + size]) for i in range(0, len(images_NHWC), size)]
        shown = np.flatnonzero(indices < PICTURES)
        arrays = {
            "index": indices.astype(np.int64),
            "digest": np.frombuffer(digests(images_NHWC), np.uint8).reshape(len(indices), -1),
            "picture_index": indices[shown].astype(np.int64),
            "picture": np.ascontiguousarray(images_NHWC[shown]),
        }
        for key, rows in zip(("features", "spatial", "logits"), zip(*parts, strict=True), strict=True):
            if rows[0] is not None:
                arrays[key] = np.concatenate(rows)
        with atomic(self._out / f"made-{indices[0]:08d}.safetensors") as temporary:
            safetensors.numpy.save_file(arrays, temporary, {"extractor": self._extractor.name})

    def clear(self) -> None:
        """Remove what the packed file makes superfluous."""
        for path in self._out.glob("made-*.safetensors"):
            path.unlink(missing_ok=True)

    def pictures(self) -> list[np.ndarray]:
        """The first images, uint8 [H, W, C], in order. Raises LookupError if there is none."""
        found: dict[int, np.ndarray] = {}
        for rows in self._files("picture_index", "picture"):
            found.update(zip(rows["picture_index"].tolist(), rows["picture"], strict=True))
        if not found:
            raise LookupError("image 0 has disappeared")
        return [found[index] for index in sorted(found)]

    def pack(self, labels_N: Labels, sampling: Mapping[str, Any]) -> None:
        """Write OUT/features.safetensors: rows by index, Gaussians over all of them.

        An image that lies in two files (two commands filled the folder at once) is counted once.

        Raises:
            LookupError: an image is missing.
        """
        files = list(self._files("index", "digest", "features", "spatial", "logits"))
        index, rows = np.unique([i for file in files for i in file["index"]], return_index=True)
        if absent := sorted(set(range(len(labels_N))) - set(index.tolist())):
            raise LookupError(f"image {absent[0]} has disappeared")
        columns = {key: np.concatenate([file.pop(key) for file in files])[rows] for key in list(files[0])}
        found = FeatureSet(
            name=str(self._out / PACKED),
            extractor=self._extractor.name,
            num=len(labels_N),
            sha256=hashlib.sha256(columns["digest"].tobytes()).hexdigest(),
            gaussian=gaussian_statistics(columns["features"]),
            spatial=gaussian_statistics(columns["spatial"]) if "spatial" in columns else None,
            features_Nd=columns["features"],
            logits_NK=columns.get("logits"),
            labels_N=labels_N,
            sampling=dict(sampling),
        )
        save_features(self._out / PACKED, found)
