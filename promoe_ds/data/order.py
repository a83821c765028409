"""Data order and random streams as pure functions: the ground of topology-invariant and resumable training.

Nothing here knows the rank, the world size or the micro-batch. Every draw belongs to a row of the *global* batch, so
ranks cut slices out of one and the same batch, and a resumed run draws what the interrupted one would have drawn.

Random bits come from Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a block
cipher of a counter: the key is (seed, step), the two high counter words are (row, purpose), and the two low words are
left to the stream itself, which may therefore draw 2^128 blocks before it meets a neighbour.

Shape suffix: G images of a global batch.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. Resumed runs rely on these numbers: add new ones, never renumber."""

    NOISE = 0
    TIME = 1
    DROP = 2
    FLIP = 3
    ORDER = 4
    POSTERIOR = 5


def philox(seed: int, number: int, third: int, fourth: int) -> np.random.Generator:
    """The stream of key (seed, number), whose counter starts at the high words (third, fourth); each in [0, 2^64)."""
    key, counter = np.array([seed, number], dtype=np.uint64), np.array([0, 0, third, fourth], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


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


@lru_cache(maxsize=2)  # a batch straddles two epochs; shuffling 1.28 M indices takes 30 ms, too long for every step
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `n` images: int64 [n], read-only because it is shared by the cache."""
    order = row_generator(seed, epoch, 0, Purpose.ORDER).permutation(n)
    order.flags.writeable = False
    return order


def step_indices(seed: int, step: int, global_batch: int, n: int) -> np.ndarray:
    """Data-set indices of optimizer step `step`: int64 [G].

    Row i is at position p = step * G + i of an endless sequence of shuffled epochs, each of which visits every image
    once: epoch = p // n, index = permutation(seed, epoch)[p % n]. A batch may straddle epochs.

    Args:
        seed: `train.seed`, in [0, 2^64).
        step: optimizer step, 0-based.
        global_batch: G.
        n: images in the data set, at least 1.
    """
    position_G = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epoch_G, offset_G = np.divmod(position_G, n)
    index_G = np.empty(global_batch, dtype=np.int64)
    for epoch in range(int(epoch_G[0]), int(epoch_G[-1]) + 1):
        here_G = epoch_G == epoch
        index_G[here_G] = _permutation(seed, epoch, n)[offset_G[here_G]]
    return index_G
