"""What a data set is to training, sampling and scoring: labelled squares in a fixed order, drawn by index.

Shape suffixes: B images, C channels, H = W size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Gauss = Callable[[tuple[int, ...]], np.ndarray]
"""shape [C, h, w] -> standard normal draws float32 [B, C, h, w], keyed by row as all that is random in training"""


def located(first: np.ndarray, index: int) -> tuple[int, int]:
    """Which of several files holds item `index`, and its place there, if they hold the items one after the other.

    Args:
        first: int64, number of the first item of each file, and at the end that of all items.
    """
    number = int(np.searchsorted(first, index, side="right")) - 1
    return number, index - int(first[number])


class ImageDataset(ABC):
    """Images or latents of named classes.

    Args:
        classes: names, in the order of the labels.
        label_B: int64, of every image.
        channels: C.
        image_size: side of an image in pixels, of a latent in cells.
        left_out: names that are no images of it: hidden, or links to folders that are read already.
    """

    unit = "pixels"
    """of `image_size`"""
    note = ""
    """how the format was told, or what is odd about it; "" if it is plain"""
    codec: dict[str, Any] | None = None
    """the record of what makes the latents; None for pixels"""
    decodes = False
    """whether pictures are decoded when they are drawn: work for several processes"""

    def __init__(self, classes: list[str], label_B: np.ndarray, channels: int, image_size: int, left_out: int = 0):
        self.classes, self.label_B, self.left_out = classes, label_B, left_out
        self.channels, self.image_size = channels, image_size

    def __len__(self) -> int:
        return len(self.label_B)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def where(self, index: int) -> str:
        """Path of image `index`, for messages; "" of one that has none."""
        return ""

    @abstractmethod
    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (or scaled latents) float32 [B, C, H, W] in [-1, 1] and labels int64 [B] of `indices` int64 [B].

        Safe in any thread.

        Raises:
            ConfigError: an image is missing or damaged; the message has its path.
            IndexError: an index is outside the data set.
        """

    def draw(self, indices: np.ndarray, flip_B: np.ndarray, gauss: Gauss) -> tuple[torch.Tensor, torch.Tensor]:
        """As `get`, but as training sees them: mirrored where `flip_B` (bool); `gauss` is for latents' posteriors."""
        x_BCHW, label_B = self.get(indices)
        if flip_B.any():  # in NumPy: torch would start a second pool of threads under the one of the stream
            x = x_BCHW.numpy()
            x_BCHW = torch.from_numpy(np.where(flip_B[:, None, None, None], x[..., ::-1], x))
        return x_BCHW, label_B
