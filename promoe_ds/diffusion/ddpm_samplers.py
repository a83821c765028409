"""Samplers of a DDPM, from noise to data: ancestral (arXiv:2006.11239, Alg. 2) and DDIM (arXiv:2010.02502).

Pure: the noise of a step is asked for by number, so whoever calls decides what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from promoe_ds.diffusion.ddpm import Schedule, at, reverse
from promoe_ds.diffusion.samplers import Callback

Predict = Callable[[Tensor, float], Tensor]
"""(x [B, C, H, W], time as the model is told it) -> [B, 2C, H, W]: eps and variance channels"""
Noise = Callable[[int], Tensor]
"""step (from 0) -> standard normal noise in the shape, dtype and device of x"""


def ancestral(
    predict: Predict, x: Tensor, schedule: Schedule, noise: Noise, clip: bool = False, callback: Callback | None = None
) -> Tensor:
    """Draw x_(t-1) from the model's Gaussian for t = T-1 .. 0; the last step takes its mean and asks for no noise.

    Args:
        x: noise [B, C, H, W]; the arithmetic is done in its dtype.
        schedule: on the device of x; its T steps are the sampler's steps.
        clip: clip every predicted image to [-1, 1].

    Returns:
        The images; `x` itself is left as it was.
    """
    times = schedule.time_T.tolist()
    for step, t in enumerate(reversed(range(schedule.num_steps))):
        t_B = torch.full((len(x),), t, device=x.device)
        here = reverse(schedule, predict(x, times[t]), x, t_B, clip)
        x = here.mean + torch.exp(0.5 * here.log_variance) * noise(step) if t else here.mean
        if callback is not None:
            callback(step, x)
    return x


def ddim(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    eta: float = 0.0,
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM eq. 12 and 16: eta 0 is deterministic, eta 1 is ancestral sampling with the variance beta-tilde.

    The variance channels are not used. Under `clip` the noise is that which belongs to the clipped image. Arguments
    and result as for `ancestral`; noise is asked for only if eta > 0.
    """
    times, s = schedule.time_T.tolist(), schedule
    for step, t in enumerate(reversed(range(s.num_steps))):
        t_B = torch.full((len(x),), t, device=x.device)
        image = reverse(s, predict(x, times[t]), x, t_B, clip).image
        ab, before = at(s.alpha_bar_T, t_B, x), at(s.alpha_bar_before_T, t_B, x)
        eps = (x - ab.sqrt() * image) / at(1 - s.alpha_bar_T, t_B, x).sqrt()
        variance = eta**2 * at(s.posterior_variance_T, t_B, x)
        rest = (at(1 - s.alpha_bar_before_T, t_B, x) - variance).clamp(min=0)  # 0 at t = 0, and not below by rounding
        x = before.sqrt() * image + rest.sqrt() * eps
        if t and eta:
            x = x + variance.sqrt() * noise(step)
        if callback is not None:
            callback(step, x)
    return x
