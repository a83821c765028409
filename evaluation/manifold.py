"""Improved precision and recall (arXiv:1904.06991), block by block, as ADM's evaluator computes them.

Shape suffixes: M N images of a block, d features.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 5000
"""rows and columns of a block of distances: 100 MB in float32"""

Distances = Literal["fp16", "fp32"]
"""fp16 rounds as ADM's TensorFlow graph does, which raises both numbers by some 0.001 to 0.002"""


def squared_distances(u_Md: Tensor, v_Nd: Tensor, distances: Distances = "fp32") -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, at least 0; float32 [M, N]. A block that overflows fp16 is computed in fp32."""
    if distances == "fp16":
        u, v = u_Md.half(), v_Nd.half()
        # products of fp16 numbers summed in fp32 and rounded once: what a GPU's fp16 matmul does
        cross = (u.float() @ v.float().T).half()
        block = _norms(u)[:, None] - 2 * cross + _norms(v)[None]
        if block.isfinite().all():
            return block.clamp(min=0).float()
    block = u_Md @ v_Nd.T
    return block.mul_(-2).add_(u_Md.square().sum(1)[:, None]).add_(v_Nd.square().sum(1)[None]).clamp_(min=0)


def _norms(x_half: Tensor) -> Tensor:
    return x_half.float().square().sum(1).half()


def radii(x_Nd: Tensor, neighbours: int = NEIGHBOURS, distances: Distances = "fp32", block: int = BLOCK) -> Tensor:
    """Squared distance of every row to its k-th nearest other row, float32 [N]: the row itself counts as the 0-th.

    Raises ValueError for k rows or fewer.
    """
    if len(x_Nd) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} rows, got {len(x_Nd)}")
    found = []
    for rows in x_Nd.split(block):
        nearest = rows.new_empty((len(rows), 0))
        for columns in x_Nd.split(block):
            nearest = torch.cat([nearest, squared_distances(rows, columns, distances)], 1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def precision_recall(
    samples: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    *,
    neighbours: int = NEIGHBOURS,
    distances: Distances = "fp32",
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> tuple[float, float]:
    """Precision: share of samples in the union of the reference's balls. Recall: share of references in the samples'.

    A ball has the radius of `radii` and includes its border. Features are [M, d] and [N, d] of any float dtype, M and
    N may differ. Raises ValueError if either has `neighbours` rows or fewer.
    """
    u, v = (torch.as_tensor(x).to(device, torch.float32) for x in (samples, reference))
    radii_u, radii_v = (radii(x, neighbours, distances, block) for x in (u, v))
    in_reference = torch.zeros(len(u), dtype=torch.bool, device=device)
    in_samples = torch.zeros(len(v), dtype=torch.bool, device=device)
    for i in range(0, len(u), block):
        for j in range(0, len(v), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            square = squared_distances(u[rows], v[columns], distances)
            in_reference[rows] |= (square <= radii_v[columns]).any(1)
            in_samples[columns] |= (square <= radii_u[rows, None]).any(0)
    return in_reference.double().mean().item(), in_samples.double().mean().item()
