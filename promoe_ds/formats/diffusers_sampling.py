"""Any scheduler of diffusers, or a refusal by name. Only exported folders use it, as part of a bundle (`bundle.py`).

Schedulers share an interface, not a meaning: one that reads the prediction as something else, has another noise
schedule, or steps to other times than it lists draws wrong images without an error. So each is first made to draw one
known picture, for which the right prediction is known at all times (`check`).

Legend: B images, C channels, H W side; T timesteps of DDPM, None for rectified flow. Time is in 0..1000 (noise).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from promoe_ds.diffusion.ddpm import linear_betas

GREY = 0.5
"""every value of the known picture"""
TOLERANCE = 0.05
"""what may be off in a scheduler's noise, where pictures reach from -1 to 1; more can be seen"""
SMALLEST_LEVEL = 1e-3
"""of noise, that the known picture's prediction divides by"""
DISTILLED = ("FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler")
"""right for models that were distilled to jump to the image: they pass the check, and draw too little variety"""
STOCK = {True: "DDPMScheduler", False: "FlowMatchEulerDiscreteScheduler"}
"""by whether T is given; what an exported folder comes with"""


def fitted(given: Any, channels: int, T: int | None, steps: int) -> tuple[Any, bool]:
    """A copy of a scheduler, told what the model predicts, and whether its `step` takes the variance channels too.

    Raises:
        ValueError: it does not draw what such a model has learned.
    """
    name, why = type(given).__name__, "it is for models that were distilled to jump to the image"
    if name not in DISTILLED:
        try:
            scheduler = copy.deepcopy(given)
            with torch.random.fork_rng(devices=[]):  # some schedulers draw noise without being given a generator
                learned = tell(scheduler, channels, T, steps)
                off = check(scheduler, channels, T, steps, learned)
            if off < TOLERANCE:
                return scheduler, learned
            why = f"its noise is {off:.2g} off, and {TOLERANCE} may be"
        except Exception as error:  # of any kind, from a scheduler with other needs
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    spacing, stock = ", timestep_spacing='trailing'" if T else "", STOCK[T is not None]
    ways = [f"build it by from_config(pipe.scheduler.config{spacing})"]
    ways.append(f"let the steps divide {T}" if T else "take more steps")
    ways += [f"take {stock}"] * (name != stock)
    way_out = f"{', '.join(ways[:-1])}, or {ways[-1]}"
    raise ValueError(f"{name} does not draw from this model in {steps} steps ({why}): {way_out}")


def tell(scheduler: Any, channels: int, T: int | None, steps: int) -> bool:
    """Set what `from_config` leaves wrong in schedulers of other kinds; returns whether variance channels are taken."""
    config = scheduler.config
    if T is None and config.get("use_flow_sigmas") is False:
        shift = config.get("shift", 1.0)
        scheduler.register_to_config(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    learned = T is not None and takes_variance(scheduler, channels, steps)
    if not learned and str(config.get("variance_type")).startswith("learned"):
        scheduler.register_to_config(variance_type=None)  # DPM-Solver would cut C channels to three
    return learned


def takes_variance(scheduler: Any, channels: int, steps: int) -> bool:
    """Whether `step` makes C channels of 2C."""
    trial, x = copy.deepcopy(scheduler), torch.zeros(1, channels, 1, 1)
    set_steps(trial, steps, x.device)
    try:
        stepped = trial.step(torch.cat([x, x], 1), trial.timesteps[0], x, return_dict=False)[0]
    except RuntimeError:  # the sizes do not match
        return False
    return stepped.shape == x.shape


def set_steps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Set the timesteps: for a flow's own scheduler from 1 to 1/steps evenly, as promoe_ds steps."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


def drawn(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    x_BCHW: Tensor,
    steps: int,
    generator: Any = None,
    progress: Callable[[Any], Iterable[Tensor]] = iter,
) -> Tensor:
    """The scheduler's result [B, C, H, W], from standard normal noise x.

    Args:
        predict: of (x, time []), with the channels that the scheduler's `step` takes.
        generator: given to a `step` that takes one.
        progress: wraps the timesteps.
    """
    set_steps(scheduler, steps, x_BCHW.device)
    takes = generator is not None and "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes else {}
    scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
    x = x_BCHW * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in progress(scheduler.timesteps):
        time = t.float() * 1000 / scheduler.config.num_train_timesteps  # the model counts to 1000
        x = scheduler.step(predict(scale(x, t), time), t, x, **extra, return_dict=False)[0]
    return x


def check(scheduler: Any, channels: int, T: int | None, steps: int, learned: bool) -> float:
    """How far the scheduler's noise is off what it tells the model, at worst, when it draws one known picture.

    If all data is the picture z, then x = a z + s noise at every time, whatever the solver and its steps, and the noise
    that is left in x is the right prediction. So x must hold noise of size s at each time that the model is told, and
    none in the end.
    """
    off = []

    def predict(x: Tensor, time: Tensor) -> Tensor:
        a, s = levels(float(time), T)
        off.append(abs(float((x - a * GREY).square().mean().sqrt()) - s))
        noise = (x - a * GREY) / max(s, SMALLEST_LEVEL)
        if T is None:
            return noise - GREY
        return torch.cat([noise, -torch.ones_like(noise)], 1) if learned else noise  # the variance of one picture

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 64, 64, generator=generator)
    x = drawn(scheduler, predict, x, steps, generator)
    off.append(float((x - GREY).square().mean().sqrt()))
    return float(np.max(off))  # NaN, if there is any


def levels(time: float, T: int | None) -> tuple[float, float]:
    """(a, s) of x = a z + s noise at a time."""
    if T is None:
        return 1 - time / 1000, time / 1000
    alpha_bar = float(np.interp(time * T / 1000, np.arange(T), torch.cumprod(1 - linear_betas(T), 0)))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
