from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from promoe_ds.data.digits import Digits


def test_all_images_in_the_promised_form():
    digits = Digits()
    x, label = digits.get(np.arange(len(digits)))
    assert len(digits) == 1797 and digits.num_classes == 10 and digits.classes == list("0123456789")
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32 and label.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1
    assert torch.bincount(label).min() > 170


def test_pixels_go_back_to_ink():
    X, y = load_digits(return_X_y=True)
    x, label = Digits().get(np.array([5, 0, 1796]))
    np.testing.assert_array_equal((x.reshape(3, 64).numpy() + 1) * 8, X[[5, 0, 1796]])
    assert label.tolist() == y[[5, 0, 1796]].tolist()


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError):
        Digits().get(np.array([1797]))
