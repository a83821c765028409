"""Sets of images on disk: ADM's .npz batches and folders of pictures, read piece by piece.

ADM's batch is an .npz with `arr_0` (uint8 [N, H, W, C]) and, with labels, `arr_1` (integers [N]); what is stored
uncompressed is mapped, not loaded. A folder's pictures are taken in order of their names. Every user's mistake raises
`ConfigError`.

Shape suffixes: N images, H W pixels, C channels. Images are uint8 NHWC in 0..255.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from promoe_ds.config.errors import reject
from promoe_ds.utils.files import walk
from promoe_ds.utils.pictures import SUFFIXES, centre_crop

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SAMPLED = re.compile(r"\d{6,}_class(\d+)\.png")
"""how launchers/sample.py names a picture"""
SHEETS = re.compile(r"grid(_\d{8,})?\.png|experts\.png")
"""what training and sampling draw beside samples"""
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, struct.error, zipfile.BadZipFile,
               zlib.error)  # fmt: skip
"""what numpy and zipfile raise for damaged, truncated, encrypted or pickled archives"""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels int64 [N], or None where nobody labelled them."""

    name: str
    images_NHWC: Images | Folder
    """read when sliced: an array, in memory or mapped, or a folder"""
    labels_N: Labels | None

    def __len__(self) -> int:
        return len(self.images_NHWC)


def digests(images_NHWC: Images) -> bytes:
    """SHA-256 of each image's shape and pixels, 32 bytes each, concatenated."""
    shape = repr(images_NHWC.shape[1:]).encode()
    return b"".join(hashlib.sha256(shape + image.tobytes()).digest() for image in images_NHWC)


def read_npz(path: Path, wanted: Collection[str], option: str) -> dict[str, np.ndarray]:
    """Those of the `wanted` arrays that an .npz holds, without pickle; checksums are verified, large arrays mapped.

    Raises:
        ConfigError: there is no such file, it is no whole .npz, or `arr_0` is not uint8 [N, H, W, C] of two or more.
    """
    if not path.exists():
        way_out = "name an existing .npz, features file or folder of pictures"
        if option == "SAMPLES":
            way_out = "draw samples first: launchers/sample.py, or name an existing .npz"
        reject(option, path, "no such file", way_out)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            arrays = {key: _member(path, archive, members[key]) for key in wanted if key in members}
    except _UNREADABLE as error:
        fault = f"is no readable .npz: damaged, truncated or pickled ({type(error).__name__})"
        reject(option, path, fault, "name another file, or draw the samples again")
    if "arr_0" in arrays:
        _check_pixels(path, arrays["arr_0"], option)
        _check_count(path, len(arrays["arr_0"]), option)
    return arrays


def npz_names(path: Path) -> str:
    """The names of all arrays in a file that `read_npz` accepted, joined for a message."""
    with zipfile.ZipFile(path) as archive:
        return ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "no named arrays"


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[np.lib.format.read_magic(stream)](stream)
        start = stream.tell()
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if dtype.hasobject or info.file_size - start != size:
            raise ValueError("pickled objects, or a header that does not match the data")
        if info.compress_type != zipfile.ZIP_STORED or fortran or not size:
            array = np.frombuffer(stream.read(), dtype)  # reading to the end compares the checksum
            return array.reshape(shape, order="F" if fortran else "C")
        while stream.read(1 << 22):
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length + start
    return np.memmap(path, dtype, "r", offset, shape)


class Folder:
    """Pictures that are read when sliced, as an array is: the first one's size and whether it is grey hold for all.

    A grey picture among coloured ones is expanded; transparency is dropped. With `size`, pictures of any size are
    cropped to the centre as in ADM (`centre_crop`), and all are RGB.

    Args:
        folder: where they lie, for messages.
        paths: of the pictures.
        option: what the user named the folder by, for messages.
        size: side of the crop.

    Raises:
        ConfigError: `paths` are fewer than two, or a picture that is read is damaged or unlike the first.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], option: str, size: int | None = None) -> None:
        _check_count(folder, len(paths), option)
        self.paths, self._option, self._size = paths, option, size
        first = self._open(paths[0])
        self._mode = "L" if size is None and first.mode in ("1", "L") else "RGB"
        width, height = (size, size) if size else first.size
        self.shape = (len(paths), height, width, len(self._mode))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice) -> Images:
        chosen = [self._pixels(path) for path in self.paths[rows]]
        return np.stack(chosen) if chosen else np.empty((0, *self.shape[1:]), np.uint8)

    def _open(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as picture:
                picture.load()
                if picture.mode.startswith(("I", "F")):  # Pillow would cut 16-bit and float pixels at 255
                    raise ValueError(f"its pixels are of mode {picture.mode}, not of 8 bits per channel")
                return picture
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reject(self._option, path, f"is no readable picture ({brief(error)})", "repair or remove it")

    def _pixels(self, path: Path) -> Images:
        picture = self._open(path)
        if self._mode == "L" and picture.mode not in ("1", "L"):
            reject(self._option, path, f"is {picture.mode}, {self.paths[0].name} is grey", "convert all to one kind")
        picture = picture.convert(self._mode)
        if self._size:
            picture = centre_crop(picture, self._size)
        pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
        if pixels.shape != self.shape[1:]:
            fault = f"is {list(pixels.shape)} (H, W, C), {self.paths[0].name} is {list(self.shape[1:])}"
            reject(self._option, path, fault, "resize them first, or for references use --size")
        return pixels


def pictures_in(folder: Path, option: str = "SAMPLES", skip: Callable[[Path], bool] = lambda path: False) -> list[Path]:
    """Pictures of a folder and of those below it, by name: the sampler's if there are any, else all but `SHEETS`.

    Hidden names are left out, and each real folder is visited once (`promoe_ds.utils.files.walk`).

    Args:
        skip: whether a folder below is left out, with all that is below it.

    Raises:
        ConfigError: a folder cannot be listed.
    """
    found, skipped = [], set()
    for path, names, _ in picture_folders(folder, option):
        if path != folder and (path.parent in skipped or skip(path)):
            skipped.add(path)
        else:
            found += [path / name for name in names if not SHEETS.fullmatch(name)]
    found.sort()
    return [path for path in found if SAMPLED.fullmatch(path.name)] or found


def picture_folders(folder: Path, option: str) -> Iterator[tuple[Path, list[str], int]]:
    """`promoe_ds.utils.files.walk` for pictures: folder, names, number of names left out. Raises `ConfigError`."""
    try:
        for path, names, left_out in walk(folder, SUFFIXES):
            yield Path(path), names, left_out
    except OSError as error:
        reject(option, error.filename, f"cannot be listed ({error.strerror})", "check the permissions")


def _check_pixels(path: Path, images_NHWC: np.ndarray, option: str) -> None:
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4:
        fault = f"arr_0 is {images_NHWC.dtype} {list(images_NHWC.shape)}, needs uint8 [N, H, W, C]"
        reject(option, path, fault, "save pixels 0..255, channels last")


def _check_count(path: Path, num: int, option: str) -> None:
    if num < 2:
        way_out = "draw more samples" if option == "SAMPLES" else "name a larger set"
        reject(option, path, f"{num} image(s), a covariance needs at least 2", way_out)


def brief(error: Exception) -> str:
    """The first line of an exception's text, or its type's name when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
