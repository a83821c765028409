"""Samplers of a DDPM, from noise to data: ancestral (arXiv:2006.11239, Alg. 2) and DDIM (arXiv:2010.02502).

Pure: the noise of a step is asked for by number, so whoever calls decides what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, repeat

import torch
from torch import Tensor

from promoe_ds.diffusion.ddpm import Schedule, at, reverse
from promoe_ds.diffusion.rectified_flow import Callback

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


def spaced_timesteps(num_steps: int, spec: int | str) -> list[int]:
    """The timesteps kept out of 0..num_steps-1, increasing, in ADM's notation (arXiv:2102.09672, Sec. 4; 2105.05233).

    - `250` (or "250"): that many, evenly spaced, first and last included.
    - "10,15,20": the range is cut into equal sections (the first ones longer by one where it does not divide), and
      each keeps that many steps, evenly spaced, its first and last included.
    - "ddim50": that many at a whole stride from 0 on; the smallest stride that gives exactly as many.

    Positions inside a section are running sums of a float stride, rounded half to even, as ADM computes them.

    Raises:
        ValueError: the notation is none of these, or asks for more steps than there are; says why, without the value.
    """
    text = str(spec).strip()
    if text.startswith("ddim"):
        count = _count(text.removeprefix("ddim"))
        for stride in range(1, num_steps + 1):
            if len(kept := range(0, num_steps, stride)) == count:
                return list(kept)
        raise ValueError(f"no whole stride gives {count} of {num_steps} timesteps")
    counts = [_count(part) for part in text.split(",")]
    size, longer = divmod(num_steps, len(counts))
    positions, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(f"keeps {count} of the {length} timesteps of a section")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        positions += [start + round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    return positions


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("is not a number of steps, nor a list like 10,15,20, nor ddimN")
    return int(text)
