"""Samplers on a model that is known exactly: images of one Gaussian, whose best noise prediction is linear in x."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promoe_ds.diffusion import ddpm
from promoe_ds.diffusion.ddpm_samplers import Predict, ancestral, ddim, spaced_timesteps

MEAN, STD = 0.4, 0.25
FULL = ddpm.Schedule.of(ddpm.linear_betas(1000))
SHAPE = (20_000, 1, 1, 1)


def gaussian_model(w: float = -1.0) -> Predict:
    """E[eps | x_t] for z ~ N(MEAN, STD^2): sqrt(1-ab) (x - sqrt(ab) MEAN) / (ab STD^2 + 1 - ab); constant w."""

    def predict(x: Tensor, time: float) -> Tensor:
        ab = float(FULL.alpha_bar_T[round(time)])
        eps = math.sqrt(1 - ab) * (x - math.sqrt(ab) * MEAN) / (ab * STD**2 + 1 - ab)
        return torch.cat([eps, torch.full_like(eps, w)], 1)

    return predict


def exact_model(schedule: ddpm.Schedule) -> Predict:
    """`gaussian_model` with the true variance of x_(t-1) given x_t: beta-tilde + (weight of z)^2 Var(z | x_t)."""
    s = schedule
    ab, beta, times = s.alpha_bar_T, s.beta_T, s.time_T.tolist()
    of_z = beta * s.alpha_bar_before_T.sqrt() / (1 - ab)
    variance = s.posterior_variance_T + of_z**2 * STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)
    low = s.posterior_log_variance_T
    w_T = 2 * (variance.log() - low) / (beta.log() - low) - 1

    def predict(x: Tensor, time: float) -> Tensor:
        return gaussian_model(float(w_T[times.index(time)]))(x, time)

    return predict


def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def noise(step: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + step))


def no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler asks for no noise")


def spaced(spec: str) -> ddpm.Schedule:
    return FULL.respaced(spaced_timesteps(1000, spec))


def assert_drawn_from_the_data(x: Tensor, tolerance: float = 0.02) -> None:
    assert abs(float(x.mean()) - MEAN) < tolerance * STD + 3 * STD / math.sqrt(len(x))
    assert abs(float(x.std()) / STD - 1) < tolerance


def test_ancestral_sampling_draws_the_data() -> None:
    x = start()
    before = x.clone()
    for spec in ("250", "20"):  # with the true variance, few steps are as good as many
        assert_drawn_from_the_data(ancestral(exact_model(spaced(spec)), x, spaced(spec), noise))
    assert torch.equal(x, before)


def test_ddim_draws_the_data_and_is_deterministic() -> None:
    first, second = (ddim(gaussian_model(), start(), spaced("250"), no_noise) for _ in range(2))
    assert torch.equal(first, second)
    assert_drawn_from_the_data(first)


def test_ddim_eta_1_is_ancestral_with_the_lower_variance() -> None:
    """DDIM Sec. 4.1: the same Gaussian at every step, so the same noise gives the same images."""
    for spec in ("50", "ddim100", "10,15,20"):
        exact = ancestral(gaussian_model(w=-1.0), start(), spaced(spec), noise)
        torch.testing.assert_close(ddim(gaussian_model(), start(), spaced(spec), noise, eta=1.0), exact)


def test_variance_channels_widen_the_ancestral_steps() -> None:
    low, high = (ancestral(gaussian_model(w), start(), spaced("25"), noise).std() for w in (-1.0, 1.0))
    assert float(high) > float(low)


def test_ancestral_step_by_step() -> None:
    """Every step is mean + std * noise of that step, the last one the mean; the model hears the original timestep."""
    schedule, heard, seen = spaced("4"), [], []
    model = gaussian_model(0.3)

    def listen(x: Tensor, time: float) -> Tensor:
        heard.append(time)
        return model(x, time)

    ancestral(listen, start(), schedule, noise, callback=lambda step, x: seen.append((step, x)))
    assert heard == [999.0, 666.0, 333.0, 0.0] and [step for step, _ in seen] == [0, 1, 2, 3]
    x = start()
    for step, t in enumerate((3, 2, 1, 0)):
        here = ddpm.reverse(schedule, model(x, heard[step]), x, torch.full((len(x),), t))
        x = here.mean + (0 if t == 0 else 1) * torch.exp(0.5 * here.log_variance) * noise(step)
        torch.testing.assert_close(seen[step][1], x, rtol=0, atol=0)


def test_clipping_confines_the_images() -> None:
    def wild(x: Tensor, time: float) -> Tensor:
        return torch.cat([5 * x, 0 * x], 1)

    for x in (
        ancestral(wild, start(), spaced("10"), noise, clip=True),
        ddim(wild, start(), spaced("10"), noise, 0.0, True),
    ):
        assert float(x.abs().max()) <= 1 + 1e-12
    assert float(ancestral(wild, start(), spaced("10"), noise).abs().max()) > 1


def test_dtype_and_bfloat16_predictions() -> None:
    model = gaussian_model()

    def rough(x: Tensor, time: float) -> Tensor:
        return model(x, time).bfloat16()

    x = start().float()
    for made in (ancestral(rough, x, spaced("5"), lambda s: noise(s).float()), ddim(rough, x, spaced("5"), no_noise)):
        assert made.dtype == torch.float32


def slow_sections(num_steps: int, counts: list[int]) -> list[int]:
    """The rule written out: walk through each section with a float position."""
    base, extra = num_steps // len(counts), num_steps % len(counts)
    kept, first = [], 0
    for number, count in enumerate(counts):
        length = base + 1 if number < extra else base
        step = 1 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.append(first + round(position))
            position += step
        first += length
    return kept


@pytest.mark.parametrize("num_steps", [1000, 997, 4000])
@pytest.mark.parametrize("counts", [[250], [1], [2], [50], [100], [333], [10, 15, 20], [1, 1, 1], [3, 200, 7, 100]])
def test_sections_follow_the_rule(num_steps: int, counts: list[int]) -> None:
    kept = spaced_timesteps(num_steps, ",".join(map(str, counts)))
    assert kept == slow_sections(num_steps, counts)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < num_steps


def test_250_of_1000() -> None:
    kept = spaced_timesteps(1000, 250)
    assert kept == spaced_timesteps(1000, "250") == [round(i * 999 / 249) for i in range(250)]
    assert kept[:4] == [0, 4, 8, 12] and kept[31:34] == [124, 128, 132] and kept[-3:] == [991, 995, 999]
    assert spaced_timesteps(1000, 1000) == list(range(1000))
    assert spaced_timesteps(1000, 1) == [0]


def test_whole_strides() -> None:
    assert spaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert spaced_timesteps(1000, "ddim250") == list(range(0, 1000, 4))
    assert spaced_timesteps(1000, "ddim1000") == list(range(1000))
    assert spaced_timesteps(1000, "ddim1") == [0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1001, "keeps 1001 of the 1000 timesteps of a section"),
        ("10,600", "keeps 600 of the 500 timesteps of a section"),
        ("ddim300", "no whole stride gives 300 of 1000 timesteps"),
        (0, "is not a number of steps"),
        ("", "is not a number of steps"),
        ("10,,5", "is not a number of steps"),
        ("ddim", "is not a number of steps"),
        ("many", "nor a list like 10,15,20, nor ddimN"),
    ],
)
def test_impossible_spacings(spec: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, spec)
