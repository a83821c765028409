"""Kernel Inception Distance (arXiv:1801.01401), by the protocol of torch-fidelity 0.4.0.

Shape suffixes: N images, m images of a subset, d features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
"""torch-fidelity's: rows are drawn by NumPy's RandomState, the samples' before the reference's"""


def kernel_sum(x_Nd: Tensor, y_Md: Tensor) -> Tensor:
    """Sum of (x.y / d + 1)^3 over all pairs of rows, without a pass over memory that is not needed."""
    base = torch.addmm(x_Nd.new_ones(()), x_Nd, y_Md.T, alpha=1 / x_Nd.shape[1]).flatten()
    return base.square() @ base


def squared_mmd(x_md: Tensor, y_md: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy of two sets of m rows; may be below zero."""
    m = len(x_md)
    within = x_md.new_zeros(())
    for z_md in (x_md, y_md):
        with_itself = (z_md.square().mean(1) + 1).pow(3).sum()
        within += kernel_sum(z_md, z_md) - with_itself
    return within / (m * (m - 1)) - 2 * kernel_sum(x_md, y_md) / m**2


def kernel_distance(
    samples: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    device: torch.device | str = "cpu",
) -> float:
    """Mean of `squared_mmd` over random subsets, in float64. Features are [N, d] and [M, d] of any float dtype.

    Sets below `size` rows are compared in subsets of the smaller one's length. Raises ValueError below two rows.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"a kernel distance needs 2 rows of each, got {len(samples)} and {len(reference)}")
    draw = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        rows = [rows_Nd[draw.choice(len(rows_Nd), size, replace=False)] for rows_Nd in (samples, reference)]
        found.append(squared_mmd(*(torch.as_tensor(each).to(device, torch.float64) for each in rows)))
    return torch.stack(found).mean().item()
