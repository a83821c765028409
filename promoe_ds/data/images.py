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
import math
import multiprocessing
import os
import zipfile
import zlib
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from promoe_ds.config.schema import reject
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.utils.files import above, hidden, walk
from promoe_ds.utils.pictures import IMAGE_MODES, SUFFIXES, centre_crop

MEMORY_LIMIT = 2**30
"""bytes of decoded pixels up to which a pack is held in memory (CIFAR-10: 154 MB; 50 classes at 64x64: 307 MB)"""
FILL_CHUNK = 256
"""images a thread decodes at a time when a pack is read into memory"""


def decode(data: bytes, where: str, channels: int, size: int) -> np.ndarray:
    """One image file to uint8 [size, size, C].

    Args:
        data: content of a file in any format Pillow reads.
        where: its path, for the message.
        channels: 1 (grey) or 3 (RGB); transparency is dropped.
        size: side in pixels.

    Raises:
        ConfigError: not an image, damaged, or of more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):  # Pillow would cut 16-bit and float pixels at 255
                image = centre_crop(image.convert(IMAGE_MODES[channels]), size)
                return np.asarray(image).reshape(size, size, channels)
    except Image.UnidentifiedImageError:  # whose own message shows an address in memory
        reject("data.path", where, "is not an image or its head is damaged", "replace the file")
    except Exception as error:  # a decoder fed with broken bytes raises OSError, SyntaxError, struct.error, ...
        conflict = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())})"
        reject("data.path", where, conflict, "replace the file")
    reject("data.path", where, f"has pixels of mode {mode}", "convert it to 8 bits per channel")


class DecodedImages(ImageDataset):
    """Images decoded when they are asked for, by a small pool of threads; or once and for all, by `hold`.

    In a worker process (`workers.py`) one thread decodes: the other processes are its siblings, and the threads of the
    pool stayed behind when it was forked.
    """

    decodes = True
    held_BHWC: np.ndarray | None = None
    """uint8, of all images"""

    def __init__(self, classes: list[str], label_B: np.ndarray, channels: int, image_size: int, left_out: int = 0):
        super().__init__(classes, label_B, channels, image_size, left_out)
        # Threads decode side by side: Pillow releases the interpreter lock while it works.
        self.pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    @abstractmethod
    def name(self, index: int) -> str:
        """What tells image `index` from the others, wherever the data set lies."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Content of the file of image `index`. Raises `ConfigError`."""

    def load(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [H, W, C]. Raises `ConfigError` where it is missing or damaged."""
        return decode(self.read(index), self.where(index), self.channels, self.image_size)

    def hold(self, memory_limit: int = MEMORY_LIMIT) -> Self:
        """Decode everything now, unless the pixels take more than `memory_limit` bytes. Raises `ConfigError`."""
        shape = (len(self), self.image_size, self.image_size, self.channels)
        if math.prod(shape) > memory_limit:
            return self
        held_BHWC = np.empty(shape, dtype=np.uint8)

        def fill(start: int) -> None:
            for index in range(start, min(start + FILL_CHUNK, len(self))):
                held_BHWC[index] = self.load(index)

        list(self.pool.map(fill, range(0, len(self), FILL_CHUNK)))  # a list raises what they raise
        self.held_BHWC, self.decodes = held_BHWC, False
        return self

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Images `indices` as uint8 [B, H, W, C]. Raises what `get` raises."""
        if self.held_BHWC is not None:
            return self.held_BHWC[indices]
        each = self.pool.map if multiprocessing.parent_process() is None else map
        return np.stack(list(each(self.load, map(int, indices))))

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        label_B, x_BHWC = torch.from_numpy(self.label_B[indices]), self.pixels(indices)
        x_BCHW = np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2), dtype=np.float32)
        x_BCHW /= 127.5
        x_BCHW -= 1
        return torch.from_numpy(x_BCHW), label_B


def list_tree(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[str], np.ndarray, int]:
    """The files of a tree with one folder per class, at any depth in their class; class ids are the ranks of the names.

    Classes may be links, also two to one folder: each has its files. A link to the tree itself is no class.

    Returns:
        names of the classes, sorted; paths of the files relative to the tree, sorted within a class (as strings: a
        million Paths would take a gigabyte); int64 labels of the files; how many names were left out (`files.walk`).

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
    return [folder.name for folder in folders], names, label_B, left_out


class FolderImages(DecodedImages):
    """Image files of `list_tree`, whose errors it raises."""

    def __init__(self, root: Path, channels: int, image_size: int) -> None:
        classes, self._names, label_B, left_out = list_tree(root)
        super().__init__(classes, label_B, channels, image_size, left_out)
        self._root = root

    def name(self, index: int) -> str:
        return self._names[index]

    def where(self, index: int) -> str:
        return str(self._root / self._names[index])

    def read(self, index: int) -> bytes:
        path = self.where(index)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            reject("data.path", path, f"cannot be read ({error.strerror})", "put the file back and start again")


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
        self._split, self._path = split, path
        self._jpeg, self._offset = arrays["jpeg"], arrays["offsets"].astype(np.int64)

    def name(self, index: int) -> str:
        return f"{self._split}/{index}"

    def where(self, index: int) -> str:
        return f"{self._path} ({self._split} image {index})"

    def read(self, index: int) -> bytes:
        start, end = self._offset[index : index + 2]
        return self._jpeg[start:end].tobytes()


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
