"""Solvers of the flow's differential equation dx/dsigma = v(x, sigma), from noise (sigma 1) to data (sigma 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from promoe_ds.diffusion.rectified_flow import shift_sigma

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, sigma): same shape and dtype as x"""
Callback = Callable[[int, Tensor], object]
"""called after every step with its number (from 0) and the state it ended in"""


def sigma_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` + 1 noise levels linspace(1, 0) under the shift of training; the ends are exactly 1 and 0."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Explicit Euler: one velocity a step, first order, exact for straight paths.

    Args:
        x: state at `sigmas[0]`, any shape; the arithmetic is done in its dtype.
        sigmas: noise levels, one more than steps.

    Returns:
        The state at `sigmas[-1]`; `x` itself is left as it was.
    """
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = x + (there - here) * velocity(x, here)
        if callback is not None:
            callback(step, x)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Heun's method (explicit trapezoid): two velocities a step, second order. Arguments and result as for `euler`."""
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = velocity(x, here)
        slope_ahead = velocity(x + (there - here) * slope, there)
        x = x + (there - here) / 2 * (slope + slope_ahead)
        if callback is not None:
            callback(step, x)
    return x
