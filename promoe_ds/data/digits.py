"""The embedded data set: scikit-learn's digits, real handwriting that needs no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the 1,797 images of its test part, as scikit-learn ships them).
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution

import numpy as np
import torch

from promoe_ds.data.dataset import ImageDataset


@cache
def read() -> np.ndarray:
    """Float [1797, 65], 64 pixels (ink, 0 to 16) and the label: what `sklearn.datasets.load_digits` reads.

    That module imports most of scikit-learn and SciPy, a second at each start of each rank.
    """
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    return np.loadtxt(str(path), delimiter=",")


class Digits(ImageDataset):
    """1,797 grey images of 8x8 pixels in ten classes, held in memory; all of them are training data."""

    def __init__(self) -> None:
        rows = read()
        super().__init__([str(digit) for digit in range(10)], rows[:, -1].astype(np.int64), 1, 8)
        self._x_BCHW = torch.from_numpy(rows[:, :-1].astype(np.float32).reshape(-1, 1, 8, 8) / 8 - 1)

    def get(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._x_BCHW[torch.as_tensor(indices)], torch.from_numpy(self.label_B[indices])
