from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from promoe_ds.diffusion.samplers import euler, heun, sigma_schedule

SOLVERS = pytest.mark.parametrize("solver", [euler, heun])


def test_schedule_ends_at_exactly_one_and_zero() -> None:
    assert sigma_schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = sigma_schedule(4, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0
    assert shifted == pytest.approx([3 * u / (1 + 2 * u) for u in sigma_schedule(4)])
    assert sigma_schedule(1) == [1.0, 0.0]


@SOLVERS
@pytest.mark.parametrize("steps", [1, 7])
def test_exact_for_straight_paths(solver: Callable, steps: int) -> None:
    z, eps = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = solver(lambda x, sigma: eps - z, eps, sigma_schedule(steps, 2.0))
    torch.testing.assert_close(x, z, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver: Callable, order: int) -> None:
    """dx/dsigma = 2 x + sigma: from x(1) the exact x(0) = (x(1) + 3/4) e^-2 - 1/4."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = (start + 0.75) * math.exp(-2) - 0.25
    errors = [
        (solver(lambda x, sigma: 2 * x + sigma, start, sigma_schedule(n)) - exact).abs().max().item()
        for n in (64, 128, 256)
    ]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@SOLVERS
def test_callback_sees_every_step_and_the_start_is_kept(solver: Callable) -> None:
    start, seen = torch.ones(2), []
    end = solver(lambda x, sigma: x, start, sigma_schedule(3), lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[-1][1], end, rtol=0, atol=0)
    torch.testing.assert_close(start, torch.ones(2), rtol=0, atol=0)
