"""Random bits from a counter (Philox-4x64-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A block cipher of a counter: whoever knows what a draw is for can make it, in any order and on any rank.
"""

from __future__ import annotations

import numpy as np


def philox(seed: int, number: int, third: int, fourth: int) -> np.random.Generator:
    """The stream of key (seed, number), whose counter starts at the high words (third, fourth); each in [0, 2^64).

    Raises:
        OverflowError: one is negative or needs more than 64 bits.
    """
    key, counter = np.array([seed, number], dtype=np.uint64), np.array([0, 0, third, fourth], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
