"""Image files as training data: class-per-folder trees, and packs of JPEGs in one npz.

A pack holds `classes` (names) and, for each split, `SPLIT_jpeg` (uint8, all files one after the other),
`SPLIT_offsets` (n + 1 byte offsets into it) and `SPLIT_labels` (n integers).

Both give square float32 images in [-1, 1]: converted to RGB (or to grey, for a model with one channel), shrunk and
cropped at the centre as in ADM (Dhariwal and Nichol 2021, arXiv:2105.05233, the preprocessing DiT and its heirs use).
An image that is missing or damaged is an error with its path; nothing is ever filled in.

Shape suffixes: B images, H rows, W columns, C channels.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from promoe_ds.config.schema import reject
from promoe_ds.utils.files import above, hidden, walk
from promoe_ds.utils.pictures import IMAGE_MODES, SUFFIXES, centre_crop

MEMORY_LIMIT = 2**30
"""bytes of decoded pixels up to which a pack is held in memory (CIFAR-10: 154 MB; 50 classes at 64x64: 307 MB)"""
FILL_CHUNK = 256
"""images a thread decodes at a time when a pack is read into memory"""


# ------------------------------------------------------------------------------------------------------------ pixels


def decode(data: bytes, where: str, channels: int, size: int) -> np.ndarray:
    """One image file to uint8 [size, size, C].

    Args:
        data: content of a file in any format Pillow reads.
        where: its path, for the message.
        channels: 1 (grey) or 3 (RGB); transparency is dropped.
        size: side in pixels.

    Raises:
        ConfigError: not an image, damaged, or of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):  # Pillow would cut 16-bit and float pixels at 255
                grey_or_rgb = image if mode == IMAGE_MODES[channels] else image.convert(IMAGE_MODES[channels])
                pixels = np.asarray(centre_crop(grey_or_rgb, size))
                return pixels.reshape(size, size, channels)
    except Exception as error:  # a decoder fed with broken bytes raises OSError, SyntaxError, struct.error, ...
        reject("data.path", where, _reason(error), "replace the file")
    reject("data.path", where, f"has pixels of mode {mode}", "convert it to 8 bits a channel")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):  # whose own message shows an address in memory
        return "is not an image or its head is damaged"
    return f"is damaged ({type(error).__name__}: {' '.join(str(error).split())})"


def _to_tensors(x_BHWC: np.ndarray, label_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pixels to float32 [B, C, H, W] in [-1, 1], labels to int64 [B]."""
    x_BCHW = np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2), dtype=np.float32)
    x_BCHW /= 127.5
    x_BCHW -= 1
    return torch.from_numpy(x_BCHW), torch.from_numpy(label_B.astype(np.int64))


def _workers() -> ThreadPoolExecutor:
    """Threads that decode side by side: Pillow releases the interpreter lock while it works."""
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")


class _Labelled:
    """Names, labels and shape: what every data set of this file has. `left_out` counts names, as in `ClassTree`.

    Args:
        classes: names, in the order of the labels.
        label_B: int64 labels of all images.
        channels: 1 or 3.
        image_size: side in pixels.
    """

    left_out = 0

    def __init__(self, classes: list[str], label_B: np.ndarray, channels: int, image_size: int) -> None:
        self.classes = classes
        self.channels = channels
        self.image_size = image_size
        self.label_B = label_B

    def __len__(self) -> int:
        return len(self.label_B)

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class DecodedImages(_Labelled, ABC):
    """Images decoded when they are asked for, by a small pool of threads."""

    def __init__(self, classes: list[str], label_B: np.ndarray, channels: int, image_size: int) -> None:
        super().__init__(classes, label_B, channels, image_size)
        self._pool = _workers()

    @abstractmethod
    def name(self, index: int) -> str:
        """What tells image `index` from the others, wherever the data set lies."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Path of image `index`, for messages."""

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, str]:
        """Content of the file of image `index` and its path for messages; raises `ConfigError`."""

    def pixels(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises `ConfigError` where it is missing or damaged."""
        return decode(*self.read(index), self.channels, self.image_size)

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1] and labels int64 [B] of `indices` int64 [B].

        Raises:
            ConfigError: an image is missing or damaged.
            IndexError: an index is outside the data set.
        """
        label_B = self.label_B[indices]
        return _to_tensors(np.stack(list(self._pool.map(self.pixels, map(int, indices)))), label_B)


class HeldImages(_Labelled):
    """The images of another data set, decoded once and held as uint8."""

    def __init__(self, source: DecodedImages) -> None:
        super().__init__(source.classes, source.label_B, source.channels, source.image_size)
        self._x_BHWC = np.empty((len(source), self.image_size, self.image_size, self.channels), dtype=np.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + FILL_CHUNK, len(source))):
                self._x_BHWC[index] = source.pixels(index)

        with _workers() as pool:
            for _ in pool.map(fill, range(0, len(source), FILL_CHUNK)):
                pass  # waiting for each raises its exception here

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1] and labels int64 [B] of `indices` int64 [B].

        Raises:
            IndexError: an index is outside the data set.
        """
        return _to_tensors(self._x_BHWC[indices], self.label_B[indices])


# ----------------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True, eq=False)
class ClassTree:
    """The files of a tree with one folder a class; class ids are the ranks of the sorted folder names."""

    classes: list[str]
    names: list[str]
    """paths relative to the tree, sorted within a class; strings: a million Paths would take a gigabyte"""
    label_B: np.ndarray
    """int64, of every file"""
    left_out: int
    """names that are hidden, or links to folders that are read already (`files.walk`)"""


def list_tree(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> ClassTree:
    """The files of a class-per-folder tree, at any depth in their class.

    Classes may be links, also two to one folder: each has its files. A link to the tree itself is no class.

    Raises:
        ConfigError: the tree cannot be listed, has no class folders, or one of them has no such files.
    """
    try:
        found = sorted(p for p in root.iterdir() if p.is_dir())
        back = {os.path.realpath(root), *above(root)}
        folders = [p for p in found if not hidden(p.name) and os.path.realpath(p) not in back]
        by_class, left_out = [], len(found) - len(folders)
        for folder in folders:
            names = []
            for parent, files, count in walk(folder, suffixes):
                prefix = os.path.relpath(parent, root)
                names += [os.path.join(prefix, name) for name in files]
                left_out += count
            if not names:
                conflict = f"a class folder without images ({' '.join(suffixes)})"
                reject("data.path", folder, conflict, "fill it or remove it")
            by_class.append(sorted(names))
    except OSError as error:
        reject("data.path", error.filename, f"cannot be listed ({error.strerror})", "check the permissions")
    if not folders:
        reject("data.path", root, "has no class folders", "put the images of each class in a folder of its own")
    label_B = np.repeat(np.arange(len(folders), dtype=np.int64), [len(names) for names in by_class])
    names = [name for names in by_class for name in names]
    return ClassTree([folder.name for folder in folders], names, label_B, left_out)


class FolderImages(DecodedImages):
    """A `ClassTree` of image files. Raises `ConfigError` as `list_tree`."""

    def __init__(self, root: Path, channels: int, image_size: int) -> None:
        tree = list_tree(root)
        super().__init__(tree.classes, tree.label_B, channels, image_size)
        self.left_out, self._root, self._names = tree.left_out, root, tree.names

    def name(self, index: int) -> str:
        return self._names[index]

    def where(self, index: int) -> str:
        return str(self._root / self._names[index])

    def read(self, index: int) -> tuple[bytes, str]:
        path = self._root / self._names[index]
        try:
            return path.read_bytes(), str(path)
        except OSError as error:
            reject("data.path", path, f"cannot be read ({error.strerror})", "put the file back and start again")


# ------------------------------------------------------------------------------------------------------------- packs


def _load_arrays(path: Path, split: str) -> dict[str, np.ndarray]:
    """The four arrays of a split, by the last part of their keys."""
    keys = {part: part if part == "classes" else f"{split}_{part}" for part in ("classes", "jpeg", "offsets", "labels")}
    if not zipfile.is_zipfile(path):
        reject("data.path", path, "is neither a folder nor a complete npz", "name a folder or a packed npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = sorted(key.removesuffix("_jpeg") for key in archive.files if key.endswith("_jpeg"))
            if splits and split not in splits:
                reject("data.split", split, f"{path} has the splits {', '.join(splits)}", "choose one of them")
            missing = [key for key in keys.values() if key not in archive.files]
            if missing:
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
    """One split of a packed npz.

    Raises:
        ConfigError: not a pack, no such split, arrays missing, ill-typed or contradicting each other.
    """

    def __init__(self, path: Path, split: str, channels: int, image_size: int) -> None:
        arrays = _load_arrays(path, split)
        flaw = _flaw(arrays)
        if flaw is not None:
            reject("data.path", path, f"split {split}: {flaw}", "write the pack again")
        classes = [str(name) for name in arrays["classes"]]
        super().__init__(classes, arrays["labels"].astype(np.int64), channels, image_size)
        self._split, self._where = split, f"{path} ({split} image %d)"
        self._jpeg = arrays["jpeg"]
        self._offset = arrays["offsets"].astype(np.int64)

    def name(self, index: int) -> str:
        return f"{self._split}/{index}"

    def where(self, index: int) -> str:
        return self._where % index

    def read(self, index: int) -> tuple[bytes, str]:
        start, end = self._offset[index : index + 2]
        return self._jpeg[start:end].tobytes(), self.where(index)

    def hold(self, memory_limit: int = MEMORY_LIMIT) -> PackedImages | HeldImages:
        """Decode everything now, unless the pixels take more than `memory_limit` bytes.

        Raises:
            ConfigError: an image is damaged.
        """
        pixel_bytes = len(self) * self.channels * self.image_size**2
        return HeldImages(self) if pixel_bytes <= memory_limit else self


# ----------------------------------------------------------------------------------------------------------- opening


def open_images(path: str, *, split: str, channels: int, image_size: int) -> FolderImages | PackedImages:
    """A class-per-folder tree (`split` is not used) or a packed npz, whichever `path` is; `~` is expanded.

    Raises:
        ConfigError: no such path, a path that is neither, an unusable number of channels, or what the two report.
    """
    if channels not in IMAGE_MODES:
        reject("model.channels", channels, "images have 1 channel (grey) or 3 (RGB)", "choose one of these")
    place = Path(path).expanduser()
    if os.path.isdir(place):  # unlike Path.is_dir, never an OSError of its own
        return FolderImages(place, channels, image_size)
    if not os.path.exists(place):
        reject("data.path", path, "does not exist", "name a class-per-folder tree or a packed npz")
    return PackedImages(place, split, channels, image_size)
