"""What all sources of image files share: one decoder, for all of them, and threads that run it.

It gives square images in [-1, 1]: converted to RGB (or to grey, for a model with one channel), shrunk and cropped at
the centre as in ADM (Dhariwal and Nichol 2021, arXiv:2105.05233, the preprocessing DiT and its heirs use). An EXIF tag
turns no picture, as in the official code. An image that is missing or damaged is an error with its path; nothing is
ever filled in.

Shape suffixes: B images, H rows, W columns, C channels.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from PIL import Image

from promoe_ds.config.errors import reject
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.utils.pictures import IMAGE_MODES, centre_crop

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
    kind: str
    """what the files are, in a few words"""
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
