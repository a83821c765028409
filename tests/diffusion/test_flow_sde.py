from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from promoe_ds.diffusion.flow_sde import SDE, Diffusion, LastStep, euler_maruyama
from promoe_ds.diffusion.rectified_flow import euler, shift_sigma

FORMS = get_args(Diffusion)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curved(x: Tensor, sigma: float) -> Tensor:
    return 0.7 * x + math.cos(3 * sigma)


def never(step: int) -> Tensor:
    raise AssertionError("no noise is needed")


@pytest.mark.parametrize("last", get_args(LastStep))
def test_without_diffusion_it_is_euler(last: LastStep) -> None:
    sde = SDE(diffusion_norm=0.0, last_step=last)
    x, sigmas = draw(3, 2, 4, 4), sde.sigmas(30)
    assert torch.equal(euler_maruyama(curved, x, sigmas, never, sde), euler(curved, x, sigmas))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_end_with_the_last_step(shift: float) -> None:
    sigmas = SDE(last_step_size=0.1).sigmas(10, shift)
    assert len(sigmas) == 11 and sigmas[0] == 1 and sigmas[-1] == 0
    even = [1 - 0.1 * i for i in range(10)]
    assert sigmas[:-1] == pytest.approx([shift * u / (1 + (shift - 1) * u) for u in even])
    assert SDE(last_step="none").sigmas(4, shift) == [shift_sigma(1 - i / 4, shift) for i in range(5)]


def by_the_score(x: Tensor, sigmas: list[float], noise: Tensor, sde: SDE) -> Tensor:
    """SiT's way: its time is 1 - sigma, its velocity data - noise, and drift and noise are made of the score."""
    for i, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        t, dt = 1 - here, here - there
        v = -curved(x, here)
        score = (t * v - x) / (here**2 + t * here)
        w = {
            "sigma": sde.diffusion_norm * here,
            "linear": sde.diffusion_norm * (1 - t),
            "constant": sde.diffusion_norm,
            "decreasing": 0.25 * (sde.diffusion_norm * math.cos(math.pi * t) + 1) ** 2,
            "increasing-decreasing": sde.diffusion_norm * math.sin(math.pi * t) ** 2,
        }[sde.diffusion]
        ends = i == len(sigmas) - 2
        if ends and sde.last_step == "tweedie":
            x = x / t + here**2 / t * score
        elif ends and sde.last_step != "none":
            x = x + dt * (v + w * score if sde.last_step == "mean" else v)
        else:
            x = x + dt * (v + w * score) + math.sqrt(2 * w * dt) * noise[i]
    return x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", get_args(LastStep))
def test_steps_are_those_of_the_score(form: Diffusion, last: LastStep) -> None:
    sde = SDE(form, 0.8, last, 0.07)
    x, noise, sigmas = draw(3, 2, 4, 4), draw(20, 3, 2, 4, 4, seed=1), sde.sigmas(20)
    ours = euler_maruyama(curved, x, sigmas, lambda step: noise[step], sde)
    torch.testing.assert_close(ours, by_the_score(x, sigmas, noise, sde), rtol=0, atol=1e-12)


def test_tweedie_is_eulers_step_to_the_end() -> None:
    x, noise = draw(2, 5), draw(9, 2, 5, seed=1)
    made = [
        euler_maruyama(curved, x, sde.sigmas(10), lambda step: noise[step], sde)
        for sde in (SDE(last_step="tweedie"), SDE(last_step="euler"), SDE(last_step="mean"))
    ]
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2])


MEAN, STD = 1.5, 0.6


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """E[eps - z given x] where z is of N(MEAN, STD^2)."""
    variance = ((1 - sigma) * STD) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return -MEAN + slope * (x - (1 - sigma) * MEAN)


def moments(sde: SDE, steps: int) -> tuple[float, float]:
    """Mean and variance in the end, exactly: a step maps x to a x + b + c n, so three starts tell a, b and c."""
    mean, variance, sigmas = 0.0, 1.0, sde.sigmas(steps)
    zero, one = (torch.full((3,), value, dtype=torch.float64) for value in (0.0, 1.0))
    for i in range(steps):
        ends = i == steps - 1 and sde.last_step != "none"
        how = sde if ends else replace(sde, last_step="none")
        pair = sigmas[i : i + 2]
        b = euler_maruyama(gaussian, zero, pair, lambda step: zero, how)[0].item()
        a = euler_maruyama(gaussian, one, pair, lambda step: zero, how)[0].item() - b
        c = euler_maruyama(gaussian, zero, pair, lambda step: one, how)[0].item() - b
        mean, variance = a * mean + b, a**2 * variance + c**2
    return mean, variance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [0.5, 1.0])
def test_a_gaussian_is_reached_whatever_the_diffusion(form: Diffusion, norm: float) -> None:
    """Mean and variance of the data, to first order in the steps; the last step shrinks with them."""
    errors = []
    for steps in (500, 1000):
        mean, variance = moments(SDE(form, norm, "mean", 1 / steps), steps)
        errors.append(abs(mean - MEAN) + abs(variance - STD**2))
    assert errors[1] < 0.01 and 1.6 < errors[0] / errors[1] < 2.5


def test_drawn_samples_have_those_moments() -> None:
    sde, generator = SDE(), torch.Generator().manual_seed(0)
    start = torch.randn(200_000, dtype=torch.float64, generator=generator)
    noise = lambda step: torch.randn(start.shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x = euler_maruyama(gaussian, start, sde.sigmas(50), noise, sde)
    mean, variance = moments(sde, 50)
    assert float(x.mean()) == pytest.approx(mean, abs=0.006) and float(x.var()) == pytest.approx(variance, rel=0.015)


def test_callback_sees_every_step_and_the_start_is_kept() -> None:
    start, seen, asked, sde = torch.ones(2), [], [], SDE()

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(2)

    end = euler_maruyama(curved, start, sde.sigmas(4), noise, sde, lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == [0, 1, 2, 3] and asked == [0, 1, 2]
    assert torch.equal(seen[-1][1], end) and torch.equal(start, torch.ones(2)) and end.dtype == torch.float32


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (SDE(diffusion="SBDM"), "infinite where a straight path begins"),  # type: ignore[arg-type]
        (SDE(diffusion="cubic"), "diffusion: is not known; choose sigma, linear"),  # type: ignore[arg-type]
        (SDE(last_step="two"), "last_step: is not known; choose mean, euler"),  # type: ignore[arg-type]
        (SDE(diffusion_norm=-1.0), "diffusion_norm: is negative or not finite"),
        (SDE(diffusion_norm=math.nan), "diffusion_norm: is negative"),
        (SDE(last_step_size=0.0), "last_step_size: does not lie in (0, 1)"),
        (SDE(last_step_size=1.0), "last_step_size: does not"),
    ],
)
def test_what_cannot_be_is_said(sde: SDE, message: str) -> None:
    field, conflict, way_out = sde.problem() or ("", "", "")
    assert message in f"{field}: {conflict}; {way_out}"


def test_what_can_be_has_no_fault() -> None:
    assert all(SDE(form, 0.5, last).problem() is None for form in FORMS for last in get_args(LastStep))
    assert SDE(last_step="none", last_step_size=0.0).problem() is None
    with pytest.raises(ValueError, match="a last step needs a step before it"):
        SDE().sigmas(1)
