"""Euler-Maruyama for rectified flow: SiT's stochastic sampler (arXiv:2401.08740; willisma/SiT @947f95b, `transport/`).

Legend as in `rectified_flow.py`. Going from noise to data, the flow dx/dsigma = v has the marginals of every SDE that
adds w score to the drift and sqrt(2 w) dW to the state, w(sigma) >= 0. On a straight path the score is -eps / sigma,
where eps = x + (1 - sigma) v is the noise that the velocity implies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from promoe_ds.config.errors import did_you_mean
from promoe_ds.diffusion.ddpm_samplers import Noise
from promoe_ds.diffusion.rectified_flow import Callback, Velocity, shift_sigma

Diffusion = Literal["sigma", "linear", "constant", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "euler", "tweedie", "none"]


@dataclass(frozen=True)
class SDE:
    """SiT's choices, with its defaults."""

    diffusion: Diffusion = "sigma"
    """w over sigma; linear is sigma, on a straight path"""
    diffusion_norm: float = 1.0
    """scales w"""
    last_step: LastStep = "mean"
    """mean: the step without its noise; euler: of the flow, and tweedie is the same on a straight path; none: as any"""
    last_step_size: float = 0.04
    """the noise level at which the last step begins, before any shift; none has no such level"""

    def w(self, sigma: float) -> float:
        """The diffusion coefficient at a noise level."""
        if self.diffusion == "constant":
            return self.diffusion_norm
        if self.diffusion == "decreasing":
            return 0.25 * (1 - self.diffusion_norm * math.cos(math.pi * sigma)) ** 2  # SiT's time is 1 - sigma
        if self.diffusion == "increasing-decreasing":
            return self.diffusion_norm * math.sin(math.pi * sigma) ** 2
        return self.diffusion_norm * sigma

    def sigmas(self, steps: int, shift: float = 1.0) -> list[float]:
        """The `steps` + 1 noise levels, from 1 to 0: even ones down to the last step, then that step.

        Raises:
            ValueError: too few steps to begin, and to end with a last step.
        """
        if self.last_step == "none":
            return [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]
        if steps < 2:
            raise ValueError("a last step needs a step before it")
        width = (1 - self.last_step_size) / (steps - 1)
        return [*(shift_sigma(1 - i * width, shift) for i in range(steps)), 0.0]

    def problem(self) -> tuple[str, str, str] | None:
        """What is wrong with these choices: field, conflict, way out; None if nothing is."""
        known, lasts = get_args(Diffusion), get_args(LastStep)
        if self.diffusion == "SBDM":
            conflict = "is sigma / (1 - sigma), infinite where a straight path begins"
            return "diffusion", conflict, f"choose {', '.join(known)}"
        if self.diffusion not in known:
            return "diffusion", "is not known", did_you_mean(self.diffusion, known, f"choose {', '.join(known)}")
        if self.last_step not in lasts:
            return "last_step", "is not known", did_you_mean(self.last_step, lasts, f"choose {', '.join(lasts)}")
        if not (math.isfinite(self.diffusion_norm) and self.diffusion_norm >= 0):
            return "diffusion_norm", "is negative or not finite", "choose 0 or more; SiT's is 1"
        if self.last_step != "none" and not 0 < self.last_step_size < 1:
            return "last_step_size", "does not lie in (0, 1)", "SiT's is 0.04"
        return None


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    sde: SDE,
    callback: Callback | None = None,
) -> Tensor:
    """x <- x + dsigma (v + w/sigma eps) + sqrt(2 w |dsigma|) n, one velocity per step; the last step as `sde` says.

    Args:
        x: state at `sigmas[0]`, any shape; the arithmetic is done in its dtype.
        sigmas: noise levels, one more than steps.
        noise: asked for the number of every step that adds some.

    Returns:
        The state at `sigmas[-1]`; `x` itself is left as it was. Without diffusion it is `euler`'s.
    """
    last = len(sigmas) - 2
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v, w = velocity(x, here), sde.w(here)
        ends = step == last and sde.last_step != "none"
        drift = v if ends and sde.last_step != "mean" else v + w / here * (x + (1 - here) * v)
        x = x + (there - here) * drift
        if w and not ends:
            x = x + math.sqrt(2 * w * (here - there)) * noise(step)
        if callback is not None:
            callback(step, x)
    return x
