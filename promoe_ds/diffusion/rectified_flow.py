"""Rectified flow (Liu et al. 2022, arXiv:2209.03003) and its noise levels (Esser et al. 2024, arXiv:2403.03206).

Legend: B images, C channels, H W side. z is an image (or latent), eps is standard normal noise, sigma in [0, 1] is the
share of noise: 0 is data, 1 is noise. The straight path x = (1 - sigma) z + sigma eps has velocity dx/dsigma = eps - z.
The solvers of dx/dsigma = v(x, sigma), from noise to data, are below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, torch.Tensor)

TIME_SCALE = 1000.0
"""the model is given t = 1000 * sigma"""


def shift_sigma(u: Number, shift: float) -> Number:
    """Move noise levels towards 1 for shift > 1 (arXiv:2403.03206, eq. 23): shift*u / (1 + (shift-1)*u).

    Args:
        u: levels in [0, 1], a float or a tensor of any shape; 0, 1 and (for shift 1) every level stay where they are.
    """
    return shift * u / (1 + (shift - 1) * u)


def sigma_from_gauss(gauss_B: torch.Tensor, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> torch.Tensor:
    """Logit-normal noise levels (arXiv:2403.03206, eq. 19): u = sigmoid(mean + std*g), then `shift_sigma`.

    Args:
        gauss_B: standard normal draws [B]; drawn by the caller, so that this stays a pure function.

    Returns:
        sigma [B] in [0, 1], dtype of `gauss_B`.
    """
    return shift_sigma(torch.sigmoid(mean + std * gauss_B), shift)


def uniform_from_gauss(gauss_B: torch.Tensor) -> torch.Tensor:
    """Phi(g), uniform in (0, 1): float64 [B] from the standard normal draws. As in `ddpm.timestep_from_gauss`."""
    return torch.special.ndtr(gauss_B.double())


def mixed_gauss(gauss_B: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw made into two independent ones: whether a level is uniform, and the draw for either kind.

    Of u = Phi(g), what lies below `share` is spread over (0, 1) again, and so is the rest.

    Args:
        gauss_B: standard normal draws [B].
        share: probability of True, in [0, 1).

    Returns:
        bool [B]; standard normal draws, float64 [B].
    """
    u_B = uniform_from_gauss(gauss_B)
    uniform_B = u_B < share
    spread_B = torch.where(uniform_B, u_B / max(share, 1e-300), (u_B - share) / (1 - share))
    return uniform_B, torch.special.ndtri(spread_B)


def _per_image(sigma_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sigma_B.view(-1, *[1] * (like.ndim - 1))


def interpolate(z_BCHW: torch.Tensor, eps_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """x = (1 - sigma) z + sigma eps, [B, C, H, W] in the dtype of the arguments."""
    sigma = _per_image(sigma_B, z_BCHW)
    return (1 - sigma) * z_BCHW + sigma * eps_BCHW


def target(z_BCHW: torch.Tensor, eps_BCHW: torch.Tensor) -> torch.Tensor:
    """Velocity dx/dsigma = eps - z, [B, C, H, W]; the same at every sigma."""
    return eps_BCHW - z_BCHW


def loss_per_image(prediction_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """Squared error of the velocity, averaged over the C*H*W elements of each image.

    Args:
        prediction_BCHW: [B, C or more, H, W], any float dtype; channels past those of the target (learned sigma, which
            rectified flow has no use for) are dropped.
        target_BCHW: [B, C, H, W].

    Returns:
        [B] float32, whatever the autocast dtype of the prediction.
    """
    error = prediction_BCHW[:, : target_BCHW.shape[1]].float() - target_BCHW.float()
    return error.square().flatten(1).mean(1)


Velocity = Callable[[Tensor, float], Tensor]
"""v(x, sigma): same shape and dtype as x"""
Callback = Callable[[int, Tensor], object]
"""called after every step with its number (from 0) and the state it ended in"""


def sigma_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` + 1 noise levels linspace(1, 0) under the shift of training; the ends are exactly 1 and 0."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Explicit Euler: one velocity per step, first order, exact for straight paths.

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
    """Heun's method (explicit trapezoid): two velocities per step, second order. Arguments, result: as of `euler`."""
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        slope = velocity(x, here)
        slope_ahead = velocity(x + (there - here) * slope, there)
        x = x + (there - here) / 2 * (slope + slope_ahead)
        if callback is not None:
            callback(step, x)
    return x
