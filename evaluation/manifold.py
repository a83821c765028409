"""Improved precision and recall (arXiv:1904.06991) and density and coverage (arXiv:2002.09797), block by block.

Precision and recall are those of ADM's evaluator: 3 neighbours, and a ball includes its border. Density and coverage
have the 5 neighbours of their authors' program (clovaai/generative-evaluation-prdc), but include the border too: with
`<` a reference in which rows repeat has balls of radius 0 that hold nothing.

Shape suffixes: M N images of a block, d features, k neighbours.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

NEIGHBOURS = 3
"""of precision and recall"""
DENSITY_NEIGHBOURS = 5
"""of density and coverage"""
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


class Manifold(NamedTuple):
    """Each is a share in [0, 1], but for density, which may exceed 1."""

    precision: float
    """share of samples in the union of the reference's balls"""
    recall: float
    """share of references in the union of the samples' balls"""
    density: float | None
    """how many balls of the reference hold a sample, in the mean, over k; None where a set has too few rows"""
    coverage: float | None
    """share of the reference's balls that hold a sample; None where a set has too few rows"""


def nearest_squares(x_Nd: Tensor, neighbours: int, distances: Distances = "fp32", block: int = BLOCK) -> Tensor:
    """Squared distances of every row to its 0-th to k-th nearest, ascending, float32 [N, k + 1]; the 0-th is itself.

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
        found.append(nearest)
    return torch.cat(found)


def manifold(
    samples: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    *,
    distances: Distances = "fp32",
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> Manifold:
    """All four from one pass over the distances; a ball has the radius of the k-th neighbour in its own set.

    Features are [M, d] and [N, d] of any float dtype, M and N may differ. Raises ValueError if either has `NEIGHBOURS`
    rows or fewer.
    """
    u, v = (torch.as_tensor(x).to(device, torch.float32) for x in (samples, reference))
    dense = min(len(u), len(v)) > DENSITY_NEIGHBOURS
    squares_u = nearest_squares(u, NEIGHBOURS, distances, block)
    squares_v = nearest_squares(v, DENSITY_NEIGHBOURS if dense else NEIGHBOURS, distances, block)
    radii_u, radii_v, wide_v = squares_u[:, NEIGHBOURS], squares_v[:, NEIGHBOURS], squares_v[:, -1]
    in_reference = torch.zeros(len(u), dtype=torch.bool, device=device)
    in_samples, covered = torch.zeros(2, len(v), dtype=torch.bool, device=device)
    balls = 0
    for i in range(0, len(u), block):
        for j in range(0, len(v), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            square = squared_distances(u[rows], v[columns], distances)
            in_reference[rows] |= (square <= radii_v[columns]).any(1)
            in_samples[columns] |= (square <= radii_u[rows, None]).any(0)
            inside = square <= wide_v[columns]
            covered[columns] |= inside.any(0)
            balls += inside.sum().item()
    precision, recall, coverage = (hit.double().mean().item() for hit in (in_reference, in_samples, covered))
    density = balls / (DENSITY_NEIGHBOURS * len(u))
    return Manifold(precision, recall, density if dense else None, coverage if dense else None)
