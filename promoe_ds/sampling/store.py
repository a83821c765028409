"""Where finished samples lie until a folder is complete, and the packed file that it ends with.

Two stores, one interface: a PNG per image, or a small npy per batch, removed when all are packed into `samples.npz`.
Each file takes its name only when it is whole, so the files *are* the record of what is done, whichever number of
processes and batch size made them.

Legend: N images, H W C pixels.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from promoe_ds.utils.files import atomic, in_threads
from promoe_ds.utils.pictures import to_image, write_png

READ_AT_ONCE = 256
"""images in memory while a folder is packed"""


class Store(Protocol):
    def read(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, C] of image `index`; None if it is missing, damaged or of another shape, hence to be made."""
        ...

    def write(self, indices: np.ndarray, images_NHWC: np.ndarray) -> None:
        """A finished batch, each file whole or absent."""
        ...

    def clear(self) -> None:
        """Remove what the packed file makes superfluous."""
        ...


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """uint8 [H, W, C] of a PNG; None if it is missing, damaged or of another shape."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    except (OSError, SyntaxError):  # Pillow reports some damaged PNGs as SyntaxError
        return None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


class PngStore:
    """000012_class2.png and so on; they stay."""

    def __init__(self, out: Path, labels: np.ndarray, shape: tuple[int, int, int]):
        self._out, self._labels, self._shape = out, labels, shape

    def path(self, index: int) -> Path:
        return self._out / f"{index:06d}_class{self._labels[index]}.png"

    def read(self, index: int) -> np.ndarray | None:
        return read_image(self.path(index), self._shape)

    def write(self, indices: np.ndarray, images_NHWC: np.ndarray) -> None:
        for index, pixels in zip(indices.tolist(), images_NHWC, strict=True):
            write_png(self.path(index), to_image(pixels))

    def clear(self) -> None:
        pass


class BatchStore:
    """made-00000012.npy, named after its first image: records of `index` int64 and `image` uint8 [H, W, C].

    What is on disk is looked at when the store is made.
    """

    def __init__(self, out: Path, shape: tuple[int, int, int]):
        self._out, self._dtype = out, np.dtype([("index", "<i8"), ("image", "u1", shape)])
        self._where: dict[int, tuple[Path, int]] = {}
        for path in sorted(out.glob("made-*.npy")):
            records = self._load(path)
            if records is not None:
                self._where.update({int(index): (path, row) for row, index in enumerate(records["index"])})

    def _load(self, path: Path) -> np.ndarray | None:
        try:
            records = in_threads(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        return records if records.dtype == self._dtype else None

    def read(self, index: int) -> np.ndarray | None:
        path, row = self._where.get(index, (None, 0))
        records = None if path is None else self._load(path)
        return None if records is None else np.array(records["image"][row])

    def write(self, indices: np.ndarray, images_NHWC: np.ndarray) -> None:
        records = np.empty(len(indices), dtype=self._dtype)
        records["index"], records["image"] = indices, images_NHWC
        with atomic(self._out / f"made-{indices[0]:08d}.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, records)

    def clear(self) -> None:
        for path in self._out.glob("made-*.npy"):
            path.unlink(missing_ok=True)


def read_all(store: Store, indices: Iterable[int]) -> Iterator[np.ndarray | None]:
    """`store.read` of each in turn, by threads and READ_AT_ONCE ahead at most."""
    waiting = list(indices)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="read") as pool:
        for start in range(0, len(waiting), READ_AT_ONCE):
            yield from pool.map(store.read, waiting[start : start + READ_AT_ONCE])


def whole(store: Store, count: int) -> Iterator[np.ndarray]:
    """The first `count` images in turn. Raises LookupError where one is missing."""
    for index, pixels in enumerate(read_all(store, range(count))):
        if pixels is None:
            raise LookupError(f"image {index} has disappeared")
        yield pixels


def write_npz(path: Path, images_NHWC: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray) -> None:
    """The packed form of ADM's evaluation: `arr_0` uint8 [N, H, W, C], `arr_1` int64 [N].

    Args:
        images_NHWC: one after the other, as `samples.npz` of 50,000 images at 256 pixels takes 9.8 GB.
        shape: [N, H, W, C].
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for pixels in images_NHWC:
                stream.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, labels)
