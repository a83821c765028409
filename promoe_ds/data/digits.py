"""The embedded data set: scikit-learn's digits, real handwriting that needs no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the 1,797 images of its test part, as scikit-learn ships them).

Shape suffixes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits


class Digits:
    """1,797 grey images of 8x8 pixels in ten classes, held in memory; all of them are training data."""

    channels = 1
    image_size = 8
    left_out = 0

    def __init__(self) -> None:
        bunch: Any = load_digits()  # a dict with attributes, which its stub does not know
        images_BHW = np.asarray(bunch.images, dtype=np.float32)
        self._x_BCHW = torch.from_numpy(images_BHW[:, None] / 8 - 1)  # ink is counted from 0 to 16
        self.label_B = np.asarray(bunch.target, dtype=np.int64)
        self.classes = [str(name) for name in bunch.target_names]

    def __len__(self) -> int:
        return len(self.label_B)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [B, 1, 8, 8] in [-1, 1] and labels int64 [B] of `indices` int64 [B].

        Raises:
            IndexError: an index is outside the data set.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self._x_BCHW[chosen], torch.from_numpy(self.label_B)[chosen]
