"""The noise that images are drawn from: of image i it depends on (seed, i) alone."""

from __future__ import annotations

import numpy as np
import torch

from promoe_ds.utils.philox import philox


def image_noise(seed: int, indices: np.ndarray, shape: tuple[int, int, int], step: int | None = None) -> torch.Tensor:
    """Standard normal noise [B, *shape] float32 on the CPU; row b depends on (seed, indices[b], step) alone.

    Philox (Salmon et al. 2011) is keyed by the pair, so images need no common generator and no order; the step is in
    the high words of its counter, which no stream reaches by counting.

    Args:
        step: of a sampler that adds noise, from 0; None is the noise that sampling starts from.
    """
    words = (0, 0) if step is None else (step, 1)
    return torch.from_numpy(
        np.stack([philox(seed, i, *words).standard_normal(shape, dtype=np.float32) for i in indices])
    )
