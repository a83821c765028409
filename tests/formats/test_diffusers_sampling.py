"""Every scheduler that diffusers ships, with a model whose data is known: right images, or a refusal by name.

The data is a Gaussian of other mean and deviation in each channel, so the exact prediction is known at every time, and
the exact image of each noise too: mean + deviation * noise, which the probability-flow ODE of both objectives gives.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from promoe_ds.formats.diffusers_export import scheduler_of
from promoe_ds.formats.diffusers_pipeline import ProMoEPipeline
from promoe_ds.formats.diffusers_sampling import fitted
from promoe_ds.recipes.load import load_config

MEAN = torch.tensor([0.6, -0.4, 0.2, 0.9]).view(4, 1, 1)
DEVIATION = torch.tensor([0.5, 0.3, 0.8, 0.4]).view(4, 1, 1)
STEPS, TRAINED = 100, 1000
STOCHASTIC = {
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "SASolverScheduler",
}
FLOW = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
DDPM = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
NEEDS_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
NEEDED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
"""options without which `from_config` itself raises"""


@cache
def shipped() -> dict[str, Any]:
    """All schedulers by name, but for those that import a package which is not installed."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        with suppress(ModuleNotFoundError):
            members = vars(importlib.import_module(module.name))
            found |= {name: kind for name, kind in members.items() if getattr(kind, "__module__", "") == module.name}
    return {name: kind for name, kind in found.items() if name.endswith("Scheduler")}


@cache
def alpha_bars() -> Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAINED, dtype=torch.float64), 0)


class Exact(nn.Module):
    """The prediction of a model that has learned the Gaussian, in the form of the exported transformer."""

    device = torch.device("cpu")

    def __init__(self, ddpm: bool, channels: int = 4):
        super().__init__()
        self.mean, self.deviation = MEAN[:channels].double(), DEVIATION[:channels].double()
        sizes = {"num_classes": 10, "channels": channels, "image_size": 8}
        self.config = SimpleNamespace(
            model=sizes, guidance_channels="all", guidance_interval=(0, 1000), ddpm_steps=TRAINED if ddpm else None
        )

    def forward(self, x: Tensor, time: Tensor, _: Tensor) -> Tensor:
        assert x.shape[1] == len(self.mean)
        t = time.double().view(-1, 1, 1, 1) / 1000
        a, s = 1 - t, t
        if self.config.ddpm_steps:
            t = (t * TRAINED).clamp(0, TRAINED - 1)
            low, high = alpha_bars()[t.floor().long()], alpha_bars()[t.ceil().long()]
            alpha_bar = low + (t - t.floor()) * (high - low)
            a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        away = (x.double() - a * self.mean) / (a**2 * self.deviation**2 + s**2)
        noise, image = s * away, self.mean + a * self.deviation**2 * away
        return (torch.cat([noise, torch.zeros_like(noise)], 1) if self.config.ddpm_steps else noise - image).float()


def stock(ddpm: bool) -> Any:
    """The scheduler of an exported folder."""
    options = ["diffusion.name=ddpm", "model.learn_sigma=true"] if ddpm else ["diffusion.shift=1.5"]
    return scheduler_of(load_config("tiny", ["model.channels=4", *options]))


def by_config(name: str, ddpm: bool, **options: Any) -> Any:
    return shipped()[name].from_config(stock(ddpm).config, **NEEDED.get(name, {}) | options)


def draw(scheduler: Any, ddpm: bool, steps: int = STEPS, channels: int = 4) -> tuple[Tensor, Tensor]:
    """(128 images, their noise)."""
    pipe = ProMoEPipeline(Exact(ddpm, channels), scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(128, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "guidance_scale": 1.0}
    images = pipe([0] * 128, num_inference_steps=steps, latents=noise, output_type="latent", **options).images
    return images, noise


@pytest.mark.parametrize("ddpm", [False, True], ids=["flow", "ddpm"])
@pytest.mark.parametrize("name", sorted(shipped()))
def test_draws_the_data_or_is_refused_by_name(name: str, ddpm: bool) -> None:
    scheduler = by_config(name, ddpm)
    if name not in (DDPM if ddpm else FLOW):
        with pytest.raises(
            ValueError, match=f"^{name} does not draw from this model in 100 steps .*: build .*take "
        ) as e:
            draw(scheduler, ddpm)
        assert "\n" not in str(e.value)
        return
    before = dict(scheduler.config)
    images, noise = draw(scheduler, ddpm)
    assert dict(scheduler.config) == before
    mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3))
    torch.testing.assert_close(mean, MEAN.flatten(), rtol=0, atol=0.03)
    torch.testing.assert_close(deviation, DEVIATION.flatten(), rtol=0.12, atol=0)
    assert ((images - MEAN - DEVIATION * noise).square().mean().sqrt() < 0.04) == (name not in STOCHASTIC)


def test_the_docs_list_what_draws() -> None:
    """docs/formats.md has one row a scheduler and a column an objective."""
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+Scheduler)`[^|]* \| (yes|no)[^|]* \| (yes|no)[^|]* \|$", text, re.M)
    assert {name for name, flow, _ in rows if flow == "yes"} == FLOW
    assert {name for name, _, ddpm in rows if ddpm == "yes"} == DDPM
    listed = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    assert (listed | FLOW | DDPM) - set(shipped()) <= NEEDS_TORCHSDE


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_variance_channels_go_where_they_are_taken(name: str, channels: int) -> None:
    images, _ = draw(by_config(name, True), True, channels=channels)
    assert images.shape[1] == channels
    torch.testing.assert_close(images.std((0, 2, 3)), DEVIATION[:channels].flatten(), rtol=0.12, atol=0)


def test_a_fixed_variance_is_left_alone() -> None:
    large, _ = draw(by_config("DDPMScheduler", True, variance_type="fixed_large"), True)
    small, _ = draw(by_config("DDPMScheduler", True, variance_type="fixed_small"), True)
    assert bool((large.std((0, 2, 3)) > small.std((0, 2, 3))).all())


def test_steps_that_lose_count_are_refused() -> None:
    """DDIM goes from t to t - T//n, whatever the next time on its list is."""
    for steps, spacing in [(5, "linspace"), (600, "linspace"), (600, "trailing")]:
        with pytest.raises(ValueError, match=f"DDIMScheduler .* in {steps} steps .*timestep_spacing='trailing'"):
            draw(by_config("DDIMScheduler", True, timestep_spacing=spacing), True, steps)
    draw(by_config("DDIMScheduler", True, timestep_spacing="trailing"), True, 5)


@pytest.mark.parametrize(
    ("scheduler", "ddpm"),
    [
        (FlowMatchEulerDiscreteScheduler(), True),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), False),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), False),
        (DDIMScheduler(), False),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), True),
        (DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False), True),
        (DDIMScheduler(prediction_type="v_prediction"), True),
        (diffusers.schedulers.HeunDiscreteScheduler(), True),
    ],
)
def test_one_of_another_model_is_refused(scheduler: Any, ddpm: bool) -> None:
    with pytest.raises(ValueError, match=f"^{type(scheduler).__name__} does not draw from this model"):
        draw(scheduler, ddpm)


def test_noise_of_the_steps_comes_from_the_generator() -> None:
    for name in sorted((STOCHASTIC & DDPM) - NEEDS_TORCHSDE):
        first, _ = draw(by_config(name, True), True, 20)
        torch.manual_seed(torch.seed())
        again, _ = draw(by_config(name, True), True, 20)
        assert torch.equal(first, again), name


def test_the_check_takes_no_noise_from_the_callers_generator() -> None:
    """The global one, from which steps draw their noise where no generator is given."""
    for name in ("DDPMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler"):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        fitted(by_config(name, True), 4, TRAINED, 20)
        assert torch.equal(torch.get_rng_state(), before), name


def test_no_scheduler_is_its_own_way_out() -> None:
    """One step of DDPM's default spacing takes noise for an image."""
    with pytest.raises(ValueError, match=r"DDPMScheduler .* in 1 steps .* or let the steps divide 1000$"):
        draw(stock(True), True, 1)
    draw(by_config("DDPMScheduler", True, timestep_spacing="trailing"), True, 1)
    draw(stock(True), True, 2)
