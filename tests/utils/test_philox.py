from __future__ import annotations

import numpy as np
import pytest

from promoe_ds.utils.philox import philox


def test_streams_are_numpys_philox_at_a_counter() -> None:
    raw = np.random.Philox(key=np.array([3, 5], np.uint64), counter=np.array([0, 0, 7, 11], np.uint64)).random_raw(8)
    assert philox(3, 5, 7, 11).bit_generator.random_raw(8).tolist() == raw.tolist()


def test_words_must_fit_in_64_bits() -> None:
    philox(2**64 - 1, 0, 2**64 - 1, 0)
    for words in ((2**64, 0, 0, 0), (0, 0, -1, 0)):
        with pytest.raises(OverflowError):
            philox(*words)
