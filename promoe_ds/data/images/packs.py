"""JPEGs packed in one npz."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.data.images.decoded import DecodedImages


def _load_arrays(path: Path, split: str) -> dict[str, np.ndarray]:
    """The four arrays of a split, by the last part of their keys."""
    keys = {part: part if part == "classes" else f"{split}_{part}" for part in ("classes", "jpeg", "offsets", "labels")}
    if not zipfile.is_zipfile(path):
        reject("data.path", path, "is neither a folder nor a complete npz", "name a folder or a packed npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = sorted(key.removesuffix("_jpeg") for key in archive.files if key.endswith("_jpeg"))
            if splits and split not in splits:
                way_out = did_you_mean(split, splits, "choose one of them")
                reject("data.split", split, f"{path} has the splits {', '.join(splits)}", way_out)
            if missing := [key for key in keys.values() if key not in archive.files]:
                reject("data.path", path, f"lacks the arrays {', '.join(missing)}", "name a packed npz of JPEG files")
            return {part: archive[key] for part, key in keys.items()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reject("data.path", path, f"cannot be read ({' '.join(str(error).split())})", "copy or write the pack again")


def _flaw(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of a split, if anything."""
    classes, jpeg, offset, label_B = (arrays[part] for part in ("classes", "jpeg", "offsets", "labels"))
    if classes.ndim != 1 or classes.dtype.kind != "U" or len(classes) == 0:
        return "classes is not a list of names"
    if jpeg.ndim != 1 or jpeg.dtype != np.uint8:
        return "jpeg is not a row of uint8"
    if label_B.ndim != 1 or label_B.dtype.kind not in "iu" or len(label_B) == 0:
        return "labels is not a row of integers"
    if offset.shape != (len(label_B) + 1,) or offset.dtype.kind not in "iu":
        return f"offsets is not a row of {len(label_B) + 1} integers, one more than the labels"
    offset = offset.astype(np.int64)  # unsigned differences would wrap around
    if offset[0] != 0 or offset[-1] != len(jpeg) or np.any(np.diff(offset) < 0):
        return f"offsets do not rise from 0 to the {len(jpeg)} bytes of jpeg"
    wrong = np.flatnonzero((label_B < 0) | (label_B >= len(classes)))
    if len(wrong):
        return f"label {label_B[wrong[0]]} of image {wrong[0]} is outside the {len(classes)} classes"
    return None


class PackedImages(DecodedImages):
    """One split of a packed npz: `classes` (names) and, for each split, `SPLIT_jpeg` (uint8, all files one after the
    other), `SPLIT_offsets` (n + 1 byte offsets into it) and `SPLIT_labels` (n integers).

    Raises:
        ConfigError: not a pack, no such split, arrays missing, ill-typed or contradicting each other.
    """

    kind = "JPEGs packed in an npz"

    def __init__(self, path: Path, split: str, channels: int, image_size: int) -> None:
        arrays = _load_arrays(path, split)
        flaw = _flaw(arrays)
        if flaw is not None:
            reject("data.path", path, f"split {split}: {flaw}", "write the pack again")
        classes = [str(name) for name in arrays["classes"]]
        super().__init__(classes, arrays["labels"].astype(np.int64), channels, image_size)
        self._split, self._path = split, path
        self._jpeg, self._offset = arrays["jpeg"], arrays["offsets"].astype(np.int64)

    def name(self, index: int) -> str:
        return f"{self._split}/{index}"

    def where(self, index: int) -> str:
        return f"{self._path} ({self._split} image {index})"

    def read(self, index: int) -> bytes:
        start, end = self._offset[index : index + 2]
        return self._jpeg[start:end].tobytes()
