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
from promoe_ds.evaluation.metrics import Moments
from promoe_ds.utils.files import atomic

PACKED = "features.safetensors"
PICTURES = 100
"""first images that are kept as pictures, for a grid"""


class FeatureStore:
    """`made-*.safetensors` in a folder; what is on disk is looked at when the store is made.

    Args:
        out: the folder.
        extractor: each batch passes through it.
    """

    def __init__(self, out: Path, extractor: FeatureExtractor):
        self._out, self._extractor = out, extractor
        self._where: dict[int, tuple[Path, int]] = {}
        for path in sorted(out.glob("made-*.safetensors")):
            rows = self._load(path, ("index",))
            if rows is not None:
                self._where.update({int(index): (path, row) for row, index in enumerate(rows["index"])})

    def _load(self, path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray] | None:
        """Those of a file's arrays that it has; None if it is damaged or of another extractor."""
        try:
            with safetensors.safe_open(path, "numpy") as file:
                if (file.metadata() or {}).get("extractor") != self._extractor.name:
                    return None
                return {key: file.get_tensor(key) for key in keys if key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError):
            return None

    def read(self, index: int) -> np.ndarray | None:
        """Something, if image `index` has been counted; None if it must be made."""
        return np.empty(0, np.uint8) if index in self._where else None

    def write(self, indices: np.ndarray, images_NHWC: Images) -> None:
        """Extract a finished batch; its file is whole or absent."""
        size = self._extractor.batch
        parts = [self._extractor.extract(images_NHWC[i : i + size]) for i in range(0, len(images_NHWC), size)]
        shown = np.flatnonzero(indices < PICTURES)
        arrays = {
            "index": indices.astype(np.int64),
            "digest": np.frombuffer(digests(images_NHWC), np.uint8).reshape(len(indices), -1),
            "features": np.concatenate([part.features_Nd for part in parts]),
            "picture_index": indices[shown].astype(np.int64),
            "picture": np.ascontiguousarray(images_NHWC[shown]),
        }
        for key, rows in (("spatial", [p.spatial_Ns for p in parts]), ("logits", [p.logits_NK for p in parts])):
            if rows[0] is not None:
                arrays[key] = np.concatenate([r for r in rows if r is not None])
        with atomic(self._out / f"made-{indices[0]:08d}.safetensors") as temporary:
            safetensors.numpy.save_file(arrays, temporary, {"extractor": self._extractor.name})

    def clear(self) -> None:
        """Remove what the packed file makes superfluous."""
        for path in self._out.glob("made-*.safetensors"):
            path.unlink(missing_ok=True)

    def pictures(self) -> list[np.ndarray]:
        """The first images, uint8 [H, W, C], in order. Raises LookupError if there is none."""
        found: dict[int, np.ndarray] = {}
        for _, rows in self._files(("picture_index", "picture")):
            found.update(zip(rows["picture_index"].tolist(), rows["picture"], strict=True))
        if not found:
            raise LookupError("image 0 has disappeared")
        return [found[index] for index in sorted(found)]

    def _files(self, keys: tuple[str, ...]) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
        for path in sorted({path for path, _ in self._where.values()}):
            rows = self._load(path, keys)
            if rows is not None:
                yield path, rows

    def pack(self, labels_N: Labels, sampling: Mapping[str, Any]) -> None:
        """Write OUT/features.safetensors: rows by index, Gaussians over all of them.

        An image that lies in two files (two commands filled the folder at once) is counted once.

        Raises:
            LookupError: an image is missing.
        """
        columns: dict[str, np.ndarray] = {}
        spatial: Moments | None = None
        counted = np.zeros(len(labels_N), bool)
        for path, rows in self._files(("index", "digest", "features", "logits", "spatial")):
            mine = [row for row, index in enumerate(rows["index"].tolist()) if self._where.get(index) == (path, row)]
            counted[rows["index"][mine]] = True
            for key in ("digest", "features", "logits"):
                if key in rows:
                    whole = columns.setdefault(key, np.empty((len(labels_N), *rows[key].shape[1:]), rows[key].dtype))
                    whole[rows["index"][mine]] = rows[key][mine]
            if "spatial" in rows:
                spatial = spatial or Moments(rows["spatial"].shape[1])
                spatial.add(rows["spatial"][mine])
        if not counted.all():
            raise LookupError(f"image {np.flatnonzero(~counted)[0]} has disappeared")
        moments = Moments(columns["features"].shape[1])
        moments.add(columns["features"])
        save_features(
            self._out / PACKED,
            FeatureSet(
                name=str(self._out / PACKED),
                extractor=self._extractor.name,
                num=len(labels_N),
                sha256=hashlib.sha256(columns["digest"].tobytes()).hexdigest(),
                gaussian=moments.gaussian(),
                spatial=spatial.gaussian() if spatial else None,
                features_Nd=columns["features"],
                logits_NK=columns.get("logits"),
                labels_N=labels_N,
                sampling=dict(sampling),
            ),
        )
