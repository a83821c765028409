"""DDPM against diffusers, against numerical integrals, and against loops over elements, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from promoe_ds.config.schema import DDPMConfig, DiffusionConfig
from promoe_ds.diffusion import ddpm
from promoe_ds.diffusion.ddpm_samplers import spaced_timesteps
from promoe_ds.diffusion.objective import make_objective

SCHEDULE = ddpm.Schedule.of(ddpm.linear_betas(1000))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(*values: int) -> Tensor:
    return torch.tensor(values)


def oracle() -> DDPMScheduler:
    """diffusers' scheduler, with float64 tables: its own are float32, too coarse for 1 - ab."""
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False
    )
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, 0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


# ----------------------------------------------------------------------------------------------------------- schedule


def test_tables_from_the_definitions() -> None:
    ab = 1.0
    for t in range(1000):
        beta, before = 1e-4 + (0.02 - 1e-4) * t / 999, ab
        ab *= 1 - beta
        assert float(SCHEDULE.beta_T[t]) == pytest.approx(beta, rel=1e-13)
        assert float(SCHEDULE.alpha_bar_T[t]) == pytest.approx(ab, rel=1e-11)
        assert float(SCHEDULE.alpha_bar_before_T[t]) == pytest.approx(before, rel=1e-11)
        assert float(SCHEDULE.posterior_variance_T[t]) == pytest.approx((1 - before) / (1 - ab) * beta, rel=1e-9)
    variance = SCHEDULE.posterior_variance_T
    assert variance[0] == 0 and SCHEDULE.posterior_log_variance_T[0] == variance[1].log()
    torch.testing.assert_close(SCHEDULE.posterior_log_variance_T[1:], variance[1:].log(), rtol=0, atol=0)
    assert SCHEDULE.time_T.tolist() == list(range(1000))


def test_other_lengths_keep_the_total_noise_and_the_range_of_times() -> None:
    short = ddpm.Schedule.of(ddpm.linear_betas(100))
    assert (float(short.beta_T[0]), float(short.beta_T[-1])) == pytest.approx((1e-3, 0.2))
    assert short.time_T.tolist() == pytest.approx([10 * t for t in range(100)])


def test_respacing_keeps_alpha_bar_and_the_original_times() -> None:
    kept = spaced_timesteps(1000, "250")
    short = SCHEDULE.respaced(kept)
    assert short.num_steps == 250 and short.time_T.tolist() == kept
    ab = 1.0
    for i, t in enumerate(kept):
        beta = 1 - float(SCHEDULE.alpha_bar_T[t]) / ab
        ab = float(SCHEDULE.alpha_bar_T[t])
        assert float(short.beta_T[i]) == pytest.approx(beta, rel=1e-9)
        assert float(short.alpha_bar_T[i]) == pytest.approx(ab, rel=1e-12)
    again = SCHEDULE.respaced(range(1000))
    torch.testing.assert_close(again.beta_T, SCHEDULE.beta_T, rtol=1e-9, atol=0)
    assert torch.isfinite(SCHEDULE.respaced([0]).posterior_log_variance_T).all()


def test_timesteps_are_uniform() -> None:
    gauss = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = ddpm.timestep_from_gauss(gauss, 1000)
    assert t.dtype == torch.int64 and int(t.min()) == 0 and int(t.max()) == 999
    count = np.bincount(t.numpy(), minlength=1000)
    assert abs(((count - 200) ** 2 / 200).sum() - 999) < 5 * math.sqrt(2 * 999)  # chi-squared
    assert ddpm.timestep_from_gauss(torch.tensor([-40.0, 0.0, 40.0]), 1000).tolist() == [0, 500, 999]


# -------------------------------------------------------------------------------------------------- forward and reverse


def test_noising_is_undone_by_the_true_noise() -> None:
    z, eps, t = draw(4, 3, 2, 2), draw(4, 3, 2, 2, seed=1), steps(0, 10, 500, 999)
    x = ddpm.q_sample(SCHEDULE, z, eps, t)
    for b, i in enumerate(t.tolist()):
        ab = float(SCHEDULE.alpha_bar_T[i])
        torch.testing.assert_close(x[b], math.sqrt(ab) * z[b] + math.sqrt(1 - ab) * eps[b])
    torch.testing.assert_close(ddpm.image_of(SCHEDULE, x, eps, t), z, rtol=0, atol=1e-11)


@pytest.mark.parametrize("clip", [False, True])
def test_posterior_of_all_1000_steps_is_that_of_diffusers(clip: bool) -> None:
    scheduler = oracle()
    scheduler.register_to_config(clip_sample=clip)
    x, prediction = draw(1, 2, 2, 2), draw(1, 4, 2, 2, seed=1)
    w = prediction[:, 2:]
    for t in range(1000):
        ours = ddpm.reverse(SCHEDULE, prediction, x, steps(t), clip)
        noise = torch.zeros_like(x)
        variance = scheduler._get_variance(t, predicted_variance=w)
        state = torch.Generator().manual_seed(t)
        theirs = scheduler.step(prediction, t, x, generator=state)
        if t:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            torch.testing.assert_close(ours.log_variance, variance, rtol=1e-9, atol=1e-9)
            noise = torch.exp(0.5 * variance) * noise
        torch.testing.assert_close(ours.mean, theirs.prev_sample - noise, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.image, theirs.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_variance_of_step_0_is_iddpms() -> None:
    """No noise is added there, but the decoder's likelihood uses it; diffusers clamps beta-tilde to 1e-20 instead."""
    low, high = float(SCHEDULE.posterior_log_variance_T[1]), math.log(1e-4)
    for w, expected in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2)):
        prediction = torch.full((1, 2, 1, 1), w, dtype=torch.float64)
        ours = ddpm.reverse(SCHEDULE, prediction, draw(1, 1, 1, 1), steps(0))
        assert float(ours.log_variance) == pytest.approx(expected, rel=1e-12)


def test_posterior_mean_by_bayes() -> None:
    """q(x_(t-1) | x_t, z) is proportional to q(x_t | x_(t-1)) q(x_(t-1) | z): numerically, on a line."""
    z, x = 0.3, -0.7
    for t in (1, 5, 100, 999):
        beta, before = float(SCHEDULE.beta_T[t]), float(SCHEDULE.alpha_bar_before_T[t])
        centre, spread = x, math.sqrt(beta) * 20 + 3
        y = np.linspace(centre - spread, centre + spread, 2_000_001)
        log_p = -((x - math.sqrt(1 - beta) * y) ** 2) / (2 * beta) - (y - math.sqrt(before) * z) ** 2 / (
            2 * (1 - before)
        )
        p = np.exp(log_p - log_p.max())
        mean = (p * y).sum() / p.sum()
        variance = (p * (y - mean) ** 2).sum() / p.sum()
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        assert float(ddpm.posterior_mean(SCHEDULE, z * one, x * one, steps(t))) == pytest.approx(mean, abs=1e-9)
        assert float(SCHEDULE.posterior_variance_T[t]) == pytest.approx(variance, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- losses


def test_kl_is_the_integral() -> None:
    for m1, v1, m2, v2 in ((0.0, 1.0, 0.5, 2.0), (1.0, 0.01, 0.9, 0.02), (0.0, 3.0, 0.0, 3.0), (0.2, 1e-4, 0.21, 5e-5)):
        y = np.linspace(m1 - 12 * math.sqrt(v1), m1 + 12 * math.sqrt(v1), 400_001)
        p = np.exp(-((y - m1) ** 2) / (2 * v1)) / math.sqrt(2 * math.pi * v1)
        ratio = -((y - m1) ** 2) / (2 * v1) + (y - m2) ** 2 / (2 * v2) - 0.5 * math.log(v1 / v2)
        numeric = np.trapezoid(p * ratio, y)
        arguments = (torch.tensor(v, dtype=torch.float64) for v in (m1, math.log(v1), m2, math.log(v2)))
        assert float(ddpm.normal_kl(*arguments)) == pytest.approx(numeric, abs=1e-9)


def log_mass(z: float, mean: float, variance: float) -> float:
    """Numerical mass of z's grey level, whose outermost cells are unbounded."""
    low = z - 1 / 255 if z > -0.999 else mean - 14 * math.sqrt(variance) - 3
    high = z + 1 / 255 if z < 0.999 else mean + 14 * math.sqrt(variance) + 3
    y = np.linspace(low, high, 2_000_001)
    p = np.exp(-((y - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return math.log(max(float(np.trapezoid(p, y)), 1e-12))


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1e-4), (0.004, 5e-5), (-0.9, 0.01), (0.97, 1e-4), (0.3, 1.0)])
def test_decoder_mass_is_the_integral(mean: float, variance: float) -> None:
    for level in (-1.0, -1 + 2 / 255, 1 / 255, 0.0, 0.3, 1 - 2 / 255, 1.0):
        z, m, v = (torch.tensor(value, dtype=torch.float64) for value in (level, mean, math.log(variance)))
        ours = float(ddpm.decoder_log_likelihood(z, m, v))
        assert ours == pytest.approx(log_mass(level, mean, variance), abs=1e-6), level
        rough = float(ddpm.decoder_log_likelihood(z.float(), m.float(), v.float()))
        assert rough == pytest.approx(ours, rel=2e-3, abs=2e-4), level


def test_masses_of_all_levels_sum_to_one() -> None:
    z = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1
    for mean, variance in ((0.0, 0.01), (0.9, 0.1)):
        m, v = torch.full_like(z, mean), torch.full_like(z, math.log(variance))
        assert float(ddpm.decoder_log_likelihood(z, m, v).exp().sum()) == pytest.approx(1, abs=1e-9)


def slow_mean(t: int, image: float, x: float) -> float:
    """DDPM eq. 7."""
    beta, ab, before = (
        float(table[t]) for table in (SCHEDULE.beta_T, SCHEDULE.alpha_bar_T, SCHEDULE.alpha_bar_before_T)
    )
    return (math.sqrt(before) * beta * image + math.sqrt(1 - beta) * (1 - before) * x) / (1 - ab)


def slow_term(t: int, z: float, x: float, guess: float, w: float) -> float:
    """L_t of one element in nats, iDDPM eq. 4-6 and 15."""
    first = max(t, 1)  # beta-tilde of step 1 stands in for the 0 of step 0
    beta, ab = float(SCHEDULE.beta_T[t]), float(SCHEDULE.alpha_bar_T[t])
    remain, before = (1 - float(SCHEDULE.alpha_bar_T[i]) for i in (first, first - 1))
    tilde = before / remain * float(SCHEDULE.beta_T[first])
    variance = math.exp((w + 1) / 2 * math.log(beta) + (1 - w) / 2 * math.log(tilde))
    mean = slow_mean(t, (x - math.sqrt(1 - ab) * guess) / math.sqrt(ab), x)
    if t == 0:
        return -log_mass(z, mean, variance)
    return 0.5 * (math.log(variance / tilde) - 1 + (tilde + (slow_mean(t, z, x) - mean) ** 2) / variance)


def slow_losses(prediction: Tensor, z: Tensor, eps: Tensor, x: Tensor, t_B: Tensor) -> tuple[list[float], list[float]]:
    """L_simple and L_t in bits, element by element."""
    mse, vb = [], []
    for b, t in enumerate(t_B.tolist()):
        guess_N, w_N = (part.flatten().tolist() for part in prediction[b].chunk(2))
        z_N, eps_N, x_N = (v[b].flatten().tolist() for v in (z, eps, x))
        mse.append(sum((e - g) ** 2 for e, g in zip(eps_N, guess_N, strict=True)) / len(z_N))
        terms = [slow_term(t, *values) for values in zip(z_N, x_N, guess_N, w_N, strict=True)]
        vb.append(sum(terms) / len(terms) / math.log(2))
    return mse, vb


def batch(t_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A prediction that is off by a little, and z, eps, x."""
    z, eps = draw(len(t_B), 2, 2, 1, seed=2).clamp(-1, 1), draw(len(t_B), 2, 2, 1, seed=3)
    prediction = torch.cat([eps + 0.3 * draw(len(t_B), 2, 2, 1, seed=4), draw(len(t_B), 2, 2, 1, seed=5)], 1)
    return prediction, z, eps, ddpm.q_sample(SCHEDULE, z, eps, t_B)


def test_losses_against_loops() -> None:
    t_B = steps(0, 0, 1, 2, 50, 500, 998, 999)
    prediction, z, eps, x = batch(t_B)
    mse, vb = ddpm.losses_per_image(SCHEDULE, prediction, z, eps, x, t_B)
    slow_mse, slow_vb = slow_losses(prediction, z, eps, x, t_B)
    assert mse.tolist() == pytest.approx(slow_mse, rel=1e-12)
    assert vb.tolist() == pytest.approx(slow_vb, rel=1e-6)
    single = [v.float() for v in (prediction, z, eps, x)]
    mse32, vb32 = ddpm.losses_per_image(SCHEDULE, *single, t_B)
    assert mse32.dtype == vb32.dtype == torch.float32
    assert vb32.tolist() == pytest.approx(vb.tolist(), rel=1e-3)


def test_the_bound_is_least_at_the_truth() -> None:
    """The true noise with w = -1 (variance beta-tilde) is the posterior itself: KL 0 for t > 0."""
    t_B = steps(1, 30, 999)
    _, z, eps, x = batch(t_B)
    truth = torch.cat([eps, torch.full_like(eps, -1.0)], 1)
    assert float(ddpm.losses_per_image(SCHEDULE, truth, z, eps, x, t_B)[1].abs().max()) < 1e-12


def test_each_loss_trains_its_own_channels() -> None:
    t_B = steps(0, 1, 500, 999)
    prediction, z, eps, x = batch(t_B)
    prediction.requires_grad_()
    mse, vb = ddpm.losses_per_image(SCHEDULE, prediction, z, eps, x, t_B)
    (of_mse,) = torch.autograd.grad(mse.sum(), prediction, retain_graph=True)
    (of_vb,) = torch.autograd.grad(vb.sum(), prediction)
    assert (of_mse[:, 2:] == 0).all() and (of_mse[:, :2] != 0).all()
    assert (of_vb[:, :2] == 0).all() and torch.isfinite(of_vb).all() and (of_vb[:, 2:] != 0).any(dim=(1, 2, 3)).all()


def test_wild_predictions_keep_losses_and_gradients_finite() -> None:
    t_B = steps(0, 0, 1, 999)
    _, z, eps, x = (v.float() for v in batch(t_B))
    prediction = torch.cat([1e3 * torch.ones_like(z), torch.tensor([-8.0, 8.0, -8.0, 8.0]).view(4, 1, 1, 1) + 0 * z], 1)
    prediction.requires_grad_()
    mse, vb = ddpm.losses_per_image(SCHEDULE, prediction, z, eps, x, t_B)
    (mse.sum() + vb.sum()).backward()
    assert torch.isfinite(vb).all() and prediction.grad is not None and torch.isfinite(prediction.grad).all()


def test_weight_of_the_bound_is_lambda_times_the_number_of_terms() -> None:
    for steps in (1000, 4000):
        objective = make_objective(DiffusionConfig(name="ddpm", ddpm=DDPMConfig(num_steps=steps)))
        assert objective.aux_loss_weights == {"vb": pytest.approx(steps / 1000)}
