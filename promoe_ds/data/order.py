"""Data order as a pure function: the epochs that all ranks walk through, whatever the topology.

Nothing here knows the rank, the world size or the micro-batch: ranks cut slices out of one and the same global batch,
and a resumed run goes on where the interrupted one would have.

Shape suffix: G images of a global batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from promoe_ds.data.step_noise import Purpose
from promoe_ds.utils.philox import philox


@lru_cache(maxsize=2)  # a batch straddles two epochs; shuffling 1.28 M indices takes 30 ms, too long for every step
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `n` images: int64 [n], read-only because it is shared by the cache."""
    order = philox(seed, epoch, 0, Purpose.ORDER).permutation(n)
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
