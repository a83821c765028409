"""Position and timestep tables against their formulas."""

from __future__ import annotations

import math

import torch

from promoe_ds.models.layers import grid_sinusoids, sinusoids


def test_timestep_sinusoids() -> None:
    table = sinusoids(torch.tensor([0.0, 250.5]), 8)
    for b, t in enumerate((0.0, 250.5)):
        for i in range(4):
            angle = t * 1e4 ** (-i / 4)
            assert math.isclose(table[b, i], math.cos(angle), abs_tol=1e-4)
            assert math.isclose(table[b, 4 + i], math.sin(angle), abs_tol=1e-4)


def test_position_table_has_columns_first_then_rows() -> None:
    table = grid_sinusoids(8, 3)
    assert table.shape == (1, 9, 8)
    for row in range(3):
        for column in range(3):
            entry = table[0, 3 * row + column]
            for half, position in ((0, column), (4, row)):
                for i in range(2):
                    angle = position / 1e4 ** (i / 2)
                    assert math.isclose(entry[half + i], math.sin(angle), abs_tol=1e-6)
                    assert math.isclose(entry[half + 2 + i], math.cos(angle), abs_tol=1e-6)
