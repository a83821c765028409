"""The noise, times and coins that a training step sees: of each row of the global batch, by (seed, step, row) alone.

Nothing here knows the rank, the world size or the micro-batch. Every draw belongs to a row of the *global* batch, so
ranks cut slices out of one and the same batch, and a resumed run draws what the interrupted one would have drawn.

The key of a stream is (seed, step) and the two high words of its counter are (row, purpose). The two low words are left
to the stream itself, which may therefore draw 2^128 blocks before it meets a neighbour. The order of the images
(`order.py`) has a purpose here too, and the number of the epoch in place of the step.

Shape suffix: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np

from promoe_ds.utils.philox import philox


class Purpose(IntEnum):
    """What a stream is for. Resumed runs rely on these numbers: add new ones, never renumber."""

    NOISE = 0
    TIME = 1
    DROP = 2
    FLIP = 3
    ORDER = 4
    POSTERIOR = 5


def row_generator(seed: int, step: int, row: int, purpose: Purpose) -> np.random.Generator:
    """The private stream of one image of one global batch, for one purpose.

    Args:
        seed: `train.seed`, in [0, 2^64).
        step: optimizer step, 0-based.
        row: position in the global batch, 0-based, whichever rank holds it.
        purpose: streams of different purposes are independent, so switching one off leaves the others as they were.

    Raises:
        OverflowError: an argument is negative or needs more than 64 bits.
    """
    return philox(seed, step, row, purpose)


def normal(seed: int, step: int, rows: np.ndarray, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [B, *shape], standard normal."""
    out = np.empty((len(rows), *shape), dtype=np.float32)
    for i, rng in enumerate(_generators(seed, step, rows, purpose)):
        rng.standard_normal(dtype=np.float32, out=out[i, ...])  # in place: a stack of rows would be copied
    return out


def coins(seed: int, step: int, rows: np.ndarray, purpose: Purpose, probability: float) -> np.ndarray:
    """bool [B], true with `probability`."""
    return np.array([rng.random() < probability for rng in _generators(seed, step, rows, purpose)])


def _generators(seed: int, step: int, rows: np.ndarray, purpose: Purpose) -> Iterator[np.random.Generator]:
    return (row_generator(seed, step, int(row), purpose) for row in rows)
