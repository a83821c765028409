from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch

from promoe_ds.config.schema import DiffusionConfig
from promoe_ds.diffusion.objective import RectifiedFlow
from promoe_ds.diffusion.rectified_flow import (
    euler,
    heun,
    interpolate,
    loss_per_image,
    shift_sigma,
    sigma_from_gauss,
    sigma_schedule,
    target,
)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_path_runs_from_data_to_noise() -> None:
    z, eps = draw(2, 3, 4, 4), draw(2, 3, 4, 4) + 1
    torch.testing.assert_close(interpolate(z, eps, torch.zeros(2, dtype=torch.float64)), z, rtol=0, atol=0)
    torch.testing.assert_close(interpolate(z, eps, torch.ones(2, dtype=torch.float64)), eps, rtol=0, atol=0)


def test_data_and_noise_are_recovered_from_state_and_velocity() -> None:
    z, eps, sigma = draw(5, 3, 4, 4), draw(5, 3, 4, 4) + 1, torch.linspace(0, 1, 5, dtype=torch.float64)
    x, v, s = interpolate(z, eps, sigma), target(z, eps), sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(x - s * v, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(x + (1 - s) * v, eps, rtol=0, atol=1e-14)


def test_velocity_is_the_derivative_of_the_path() -> None:
    z, eps, h = draw(1, 3, 4, 4), draw(1, 3, 4, 4) + 1, 1e-3
    ahead = interpolate(z, eps, torch.tensor([0.3 + h], dtype=torch.float64))
    behind = interpolate(z, eps, torch.tensor([0.3 - h], dtype=torch.float64))
    torch.testing.assert_close((ahead - behind) / (2 * h), target(z, eps), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.7)])
def test_levels_are_logit_normal(mean: float, std: float) -> None:
    """Quantiles: P(sigma <= s) = Phi((logit(s) - mean) / std), at evenly spaced quantiles of the draw."""
    probability = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = sigma_from_gauss(torch.special.ndtri(probability), mean, std)
    torch.testing.assert_close(torch.special.ndtr((torch.logit(sigma) - mean) / std), probability, rtol=0, atol=1e-12)


def test_shift_adds_its_logarithm_to_the_logit() -> None:
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = torch.sigmoid(torch.logit(u) + torch.tensor(3.0, dtype=torch.float64).log())
    torch.testing.assert_close(shift_sigma(u, 3.0), moved, rtol=0, atol=1e-14)
    torch.testing.assert_close(shift_sigma(u, 1.0), u, rtol=0, atol=0)
    gauss = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(sigma_from_gauss(gauss, shift=3.0), shift_sigma(torch.sigmoid(gauss), 3.0))


def test_levels_keep_float32() -> None:
    assert sigma_from_gauss(torch.zeros(3), 0.0, 1.0, 1.0).dtype == torch.float32


def test_loss_averages_elements_of_each_image_in_float32() -> None:
    prediction, wanted = draw(3, 4, 5, 5).bfloat16(), draw(3, 2, 5, 5) + 1
    loss = loss_per_image(prediction, wanted)
    by_hand = torch.zeros(3, dtype=torch.float64)
    for b, c, i, j in itertools.product(range(3), range(2), range(5), range(5)):
        by_hand[b] += (prediction[b, c, i, j].double() - wanted[b, c, i, j]) ** 2 / 50
    assert loss.dtype == torch.float32 and loss.shape == (3,)
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-6, atol=0)


def test_loss_ignores_the_learned_sigma_channels() -> None:
    prediction, wanted = draw(3, 4, 5, 5).requires_grad_(), draw(3, 2, 5, 5) + 9
    loss_per_image(prediction, wanted).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[:, 2:].abs().max() == 0 < prediction.grad[:, :2].abs().min()


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


def levels(draws: int = 20_000, **options: Any) -> torch.Tensor:
    """Noise levels in float64, of evenly spaced quantiles of the normal draw."""
    probability = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    objective = RectifiedFlow(DiffusionConfig(**options), torch.device("cpu"))
    return objective.levels(torch.special.ndtri(probability))


def test_uniform_levels_are_uniform_and_keep_the_order_of_the_draws() -> None:
    """Evenly spaced quantiles become evenly spaced levels; real draws pass a Kolmogorov-Smirnov test."""
    sigma = levels(1000, timesteps="uniform")
    torch.testing.assert_close(sigma, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, rtol=0, atol=1e-12)
    shifted = levels(1000, timesteps="uniform", shift=3.0)
    torch.testing.assert_close(shifted, shift_sigma(sigma, 3.0), rtol=0, atol=1e-12)
    gauss = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    drawn = RectifiedFlow(DiffusionConfig(timesteps="uniform"), torch.device("cpu")).levels(gauss)
    assert drawn.dtype == torch.float32 and scipy.stats.kstest(drawn.double(), "uniform").pvalue > 0.01
    logit_normal = torch.sigmoid(gauss).double()
    assert scipy.stats.kstest(logit_normal, "uniform").pvalue < 1e-6, "the test tells them apart"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_mix_has_the_density_of_both(share: float, shift: float) -> None:
    """P(sigma <= s) = share * u + (1 - share) Phi((logit(u) - mean) / std) at the u that the shift moves to s."""
    sigma = levels(timesteps="mix", uniform_share=share, logit_mean=0.7, logit_std=0.8, shift=shift)
    s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    found, u = (sigma[None] <= s[:, None]).double().mean(1), s / (shift - (shift - 1) * s)
    expected = share * u + (1 - share) * torch.special.ndtr((torch.logit(u) - 0.7) / 0.8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_default_levels_are_unchanged_to_the_bit() -> None:
    gauss = torch.randn(100, generator=torch.Generator().manual_seed(0))
    objective = RectifiedFlow(DiffusionConfig(logit_mean=0.3, shift=2.0), torch.device("cpu"))
    assert torch.equal(objective.levels(gauss), sigma_from_gauss(gauss, 0.3, 1.0, 2.0))


def test_a_positive_mean_is_more_noise_and_less_in_diffusers() -> None:
    """Ours is the level itself; the training scripts of diffusers take entry 1000 u of a table that descends.

    The same mean gives levels that are mirrored: ours at mean m are theirs at mean -m.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    table = FlowMatchEulerDiscreteScheduler().sigmas
    assert table[0] == 1 and table[-1] < 0.002

    def theirs(mean: float) -> float:
        u = compute_density_for_timestep_sampling(
            "logit_normal", 20_000, mean, 1.0, generator=torch.Generator().manual_seed(0)
        )
        return float(table[(u * 1000).long()].mean())

    def ours(mean: float) -> float:
        return float(levels(logit_mean=mean).mean())

    assert ours(1.0) > 0.65 > 0.35 > theirs(1.0)
    assert ours(1.0) == pytest.approx(theirs(-1.0), abs=0.01) and ours(0.0) == pytest.approx(0.5, abs=1e-9)
    z, eps = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert interpolate(z, eps, torch.tensor([0.9])).mean() == pytest.approx(0.9), "0.9 is nine tenths of noise"
