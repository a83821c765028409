"""The embedded data set: scikit-learn's digits, real handwriting that needs no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the 1,797 images of its test part, as scikit-learn ships them).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from promoe_ds.data.dataset import ImageDataset


@cache  # it is parsed from text
def read() -> Any:
    return load_digits()  # a dict with attributes, which its stub does not know


class Digits(ImageDataset):
    """1,797 grey images of 8x8 pixels in ten classes, held in memory; all of them are training data."""

    def __init__(self) -> None:
        bunch = read()
        super().__init__([str(name) for name in bunch.target_names], bunch.target.astype(np.int64), 1, 8)
        # ink is counted from 0 to 16
        self._x_BCHW = torch.from_numpy(bunch.images.astype(np.float32)[:, None] / 8 - 1)

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._x_BCHW[torch.as_tensor(indices)], torch.from_numpy(self.label_B[indices])
