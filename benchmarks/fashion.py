"""Fashion-MNIST (arXiv:1708.07747), as Debian's package dataset-fashion-mnist has it, to a pack that `data.path` reads.

The four files are gzipped IDX: big-endian 32-bit integers (2051 for images, 2049 for labels; then the sizes), then one
byte per pixel or label. The pack holds the same pixels as PNG, which loses nothing.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promoe_ds.config.errors import reject
from promoe_ds.utils.files import atomic

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""where Debian's package puts the files"""
CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SPLITS = {"train": "train", "test": "t10k"}
"""split -> how its files' names begin"""


def read_idx(path: Path, dims: int) -> np.ndarray:
    """uint8, of `dims` dimensions. Raises ConfigError for a file that is missing or is no such IDX."""
    way_out = "install Debian's dataset-fashion-mnist, or add --path FOLDER with its four files"
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        reject("--path", path, f"cannot be read ({' '.join(str(error).split())})", way_out)
    head = struct.unpack_from(f">{dims + 1}I", data) if len(data) >= 4 * (dims + 1) else (0,)
    if head[0] != 0x800 + dims or len(data) != 4 * (dims + 1) + math.prod(head[1:]):
        reject("--path", path, f"is no IDX of bytes in {dims} dimension(s)", way_out)
    return np.frombuffer(data, np.uint8, offset=4 * (dims + 1)).reshape(head[1:])


def png(pixels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()


def pack(folder: Path, target: Path) -> None:
    """Write both splits as one packed npz; whole or not there. Raises ConfigError for files that do not fit."""
    arrays: dict[str, Any] = {"classes": np.array(CLASSES)}
    for split, prefix in SPLITS.items():
        images_NHW = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
        label_N = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(images_NHW) != len(label_N):
            conflict = f"has {len(images_NHW)} images and {len(label_N)} labels of {prefix}"
            reject("--path", folder, conflict, "copy its files again")
        files = [png(image_HW) for image_HW in images_NHW]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = label_N.astype(np.int64)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
