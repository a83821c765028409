"""The seam: what training and sampling get from an objective, and the errors of choosing a sampler."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import SHIFTS, Config
from promoe_ds.diffusion import ddpm
from promoe_ds.diffusion import rectified_flow as flow
from promoe_ds.diffusion.flow_sde import SDE, euler_maruyama
from promoe_ds.diffusion.objective import OBJECTIVES, RectifiedFlow, Solver, choose_sampler, make_objective
from promoe_ds.diffusion.rectified_flow import euler, heun, sigma_schedule
from promoe_ds.recipes.load import load_config

FLOW = load_config("tiny")
DDPM = load_config("tiny", ["model.learn_sigma=true", "diffusion.name=ddpm"])


class Output(NamedTuple):
    prediction: Tensor


class Recorder:
    """A model that answers twice its input, on both halves of the channels, and notes what it was given."""

    x: Tensor
    t: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Output:
        self.x, self.t = x, t
        return Output(torch.cat([2 * x, 0 * x], 1))


def batch(size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(size, 1, 4, 4, generator=generator) for _ in range(2))
    return z, eps, torch.randn(size, generator=generator)


def test_flow_loss_is_the_velocity_error() -> None:
    model, (z, eps, gauss) = Recorder(), batch()
    output, losses = make_objective(FLOW.diffusion).loss(model, z, eps, gauss)
    sigma = torch.sigmoid(gauss)
    assert torch.equal(model.x, flow.interpolate(z, eps, sigma)) and torch.equal(model.t, 1000 * sigma)
    assert losses.keys() == {"diffusion"} and make_objective(FLOW.diffusion).aux_loss_weights == {}
    expected = flow.loss_per_image(output.prediction, flow.target(z, eps)).mean()
    assert torch.equal(losses["diffusion"], expected)


def test_ddpm_loss_is_mse_and_bound() -> None:
    model, (z, eps, gauss) = Recorder(), batch()
    objective = make_objective(DDPM.diffusion)
    output, losses = objective.loss(model, z, eps, gauss)
    t = ddpm.timestep_from_gauss(gauss, 1000)
    schedule = ddpm.Schedule.of(ddpm.linear_betas(1000))
    assert torch.equal(model.x, ddpm.q_sample(schedule, z, eps, t))
    assert model.t.dtype == torch.float32 and model.t.tolist() == t.tolist()
    mse, vb = ddpm.losses_per_image(schedule, output.prediction, z, eps, model.x, t)
    assert losses.keys() == {"diffusion", "vb"} and objective.aux_loss_weights == {"vb": pytest.approx(1.0)}
    torch.testing.assert_close(losses["diffusion"], (eps - 2 * model.x).square().mean())
    assert torch.equal(losses["diffusion"], mse.mean()) and torch.equal(losses["vb"], vb.mean())


def test_a_shorter_schedule_tells_the_model_times_up_to_1000() -> None:
    config = load_config("tiny", ["model.learn_sigma=true", "diffusion.name=ddpm", "diffusion.ddpm.num_steps=100",
                                  "sample.steps=10"])  # fmt: skip
    objective, model, (z, eps, gauss) = make_objective(config.diffusion), Recorder(), batch()
    objective.loss(model, z, eps, gauss)
    t = ddpm.timestep_from_gauss(gauss, 100)
    assert model.t.tolist() == pytest.approx([10.0 * i for i in t.tolist()]) and int(t.max()) > 50
    assert objective.aux_loss_weights["vb"] == pytest.approx(0.1)
    assert objective.timesteps(Solver("ddpm", 10)) == pytest.approx([990, 880, 770, 660, 550, 440, 330, 220, 110, 0])


@pytest.mark.parametrize(
    ("config", "sampler"),
    [(FLOW, "euler"), (FLOW, "heun"), (FLOW, "sde"), (DDPM, "ddpm"), (DDPM, "ddim")],
    ids=lambda x: str(x)[:5],
)
def test_samplers_tell_the_model_the_times_announced(config: Config, sampler: str) -> None:
    objective, x = make_objective(config.diffusion), torch.ones(2, 1, 4, 4)
    heard: list[float] = []
    ticks: list[int] = []

    def predict(x: Tensor, time: float) -> Tensor:
        heard.append(time)
        return torch.cat([0.1 * x, 0 * x], 1)

    def tick(step: int, state: Tensor) -> None:
        ticks.append(step)

    solver, count = choose_sampler(config, sampler, 4, 0.5 if sampler == "ddim" else 0.0)
    out = objective.sample(predict, lambda step: x if step is None else torch.zeros_like(x), solver, tick)
    assert out.shape == x.shape and out.dtype == x.dtype and ticks == [0, 1, 2, 3]
    assert heard[:: 2 if sampler == "heun" else 1] == objective.timesteps(solver)
    assert solver.sampler == sampler and count == 4


def test_flow_samplers_are_the_solvers() -> None:
    objective, x = make_objective(FLOW.diffusion), batch()[0]

    def predict(x: Tensor, time: float) -> Tensor:
        return torch.cat([x * time / 1000, torch.full_like(x, torch.nan)], 1)

    asked: list[int | None] = []

    def noise(step: int | None) -> Tensor:
        asked.append(step)
        return x

    for name, solver in (("euler", euler), ("heun", heun)):
        expected = solver(lambda x, sigma: x * (1000 * sigma) / 1000, x, sigma_schedule(5))
        assert torch.equal(objective.sample(predict, lambda step: x, Solver(name, 5)), expected)
        shifted = solver(lambda x, sigma: x * (1000 * sigma) / 1000, x, sigma_schedule(5, 3.0))
        assert torch.equal(objective.sample(predict, lambda step: x, Solver(name, 5, shift=3.0)), shifted)
    sde = SDE("constant", 0.3, "euler", 0.1)
    expected = euler_maruyama(lambda x, sigma: x * (1000 * sigma) / 1000, x, sde.sigmas(5, 2.0), lambda step: x, sde)
    made = objective.sample(predict, noise, Solver("sde", 5, shift=2.0, sde=sde))
    assert torch.equal(made, expected)
    assert asked[0] is None and asked[1:] == list(range(len(asked) - 1)) and len(asked) in (5, 6)


def test_default_samplers() -> None:
    assert choose_sampler(FLOW, None, 250) == (Solver("euler", 250), 250)
    assert choose_sampler(DDPM, None, 250) == (Solver("ddpm", 250), 250)
    assert choose_sampler(DDPM, "ddim", "10,15,20", 1.0) == (Solver("ddim", "10,15,20", 1.0), 45)
    assert choose_sampler(FLOW, "sde", 250)[0].sde == SDE("sigma", 1.0, "mean", 0.04)
    assert {name: cls.samplers for name, cls in OBJECTIVES.items()} == {
        "rectified_flow": ("euler", "heun", "sde"),
        "ddpm": ("ddpm", "ddim"),
    }


def test_the_shift_of_sampling_is_apart_from_that_of_training() -> None:
    """`sample.shift`, else `diffusion.shift`; what is asked for comes first."""
    config = load_config("tiny", ["diffusion.shift=3", "sample.shift=0.5"])
    trained = load_config("tiny", ["diffusion.shift=3"])
    for known, asked, shift in ((config, None, 0.5), (config, 2.0, 2.0), (trained, None, 3.0), (trained, 1.0, 1.0)):
        solver, _ = choose_sampler(known, None, 4, shift=asked)
        u = [1.0, 0.75, 0.5, 0.25]
        expected = [1000 * shift * x / (1 + (shift - 1) * x) for x in u]
        assert make_objective(known.diffusion).timesteps(solver) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [SHIFTS[0], math.nextafter(SHIFTS[1], 0)])
@pytest.mark.parametrize("timesteps", ["logit_normal", "uniform", "mix"])
def test_levels_are_numbers_at_the_ends_of_what_may_be_chosen(shift: float, timesteps: str) -> None:
    words = [f"diffusion.shift={shift}", f"diffusion.timesteps={timesteps}"]
    for more in ("logit_mean=3e38", "logit_mean=-3e38", "logit_std=3e38", "logit_std=2e-38", "uniform_share=2e-38"):
        config = load_config("tiny", [*words, f"diffusion.{more}"])
        objective = make_objective(config.diffusion)
        assert isinstance(objective, RectifiedFlow)
        levels = objective.levels(torch.linspace(-9, 9, 1000))
        assert levels.isfinite().all() and 0 <= levels.min() and levels.max() <= 1 + 1e-4
        times = objective.timesteps(Solver("euler", 7))
        assert times == sorted(times, reverse=True) and times[0] == pytest.approx(1000)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (FLOW, ("ddim", 10, 0.0), "--sampler=ddim: the model was trained with diffusion.name=rectified_flow"),
        (DDPM, ("euler", 10, 0.0), "trained with diffusion.name=ddpm; choose ddpm or ddim"),
        (DDPM, ("ddpm", 10, 0.5), "--eta=0.5: the sampler ddpm has no eta; remove it, or add --sampler ddim"),
        (DDPM, ("ddim", 10, 1.5), "--eta=1.5: must lie in [0, 1]"),
        (DDPM, ("ddim", 10, float("nan")), "--eta=nan: must lie in [0, 1]"),
        (DDPM, (None, 1001, 0.0), "--steps=1001: keeps 1001 of the 1000 timesteps of a section; choose another number"),
        (DDPM, (None, "many", 0.0), "--steps=many: is not a number of steps"),
        (FLOW, (None, "ddim50", 0.0), "--steps=ddim50: rectified flow takes a number of steps"),
        (DDPM, ("sde", 10, 0.0), "--sampler=sde: the model was trained with diffusion.name=ddpm; choose ddpm or ddim"),
        (DDPM, (None, 10, 0.0, 3.0), "--shift=3.0: the sampler ddpm has no noise levels to shift; remove it"),
        (FLOW, (None, 10, 0.0, 0.0), "--shift=0.0: must lie in [0.001, 1000); choose such a value"),
        (FLOW, (None, 10, 0.0, 1e-300), "--shift=1e-300: must lie in [0.001, 1000)"),
        (FLOW, (None, 10, 0.0, float("nan")), "--shift=nan: must lie in [0.001, 1000)"),
        (FLOW, ("heun", 10, 0.0, None, SDE()), "--sampler=heun: has no diffusion and no last step, which belong to"),
        (DDPM, (None, 10, 0.0, None, SDE()), "which belong to the sampler sde; remove them"),
        (FLOW, ("sde", 10, 0.0, None, SDE(diffusion_norm=-1)), "--diffusion-norm=-1: is negative or not finite"),
        (FLOW, ("sde", 1, 0.0), "--steps=1: a last step needs a step before it; choose another number of steps"),
    ],
)  # fmt: skip
def test_samplers_that_cannot_be(config: Config, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_sampler(config, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
