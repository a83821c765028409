"""Guidance: classifier-free (Ho & Salimans 2022, arXiv:2207.12598), within an interval of time (Kynkaanniemi et al.
2024, arXiv:2404.07724), or by a weaker model (autoguidance, Karras et al. 2024, arXiv:2406.02507)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from promoe_ds.config.schema import Channels, Interval
from promoe_ds.diffusion.ddpm_samplers import Predict

ALWAYS: Interval = (0.0, 1000.0)
ROUNDING = 1e-3
"""of times, which schedulers of other tools compute in float32; an end of the interval lies in it"""


def guides(scale: float, interval: Interval, time: float) -> bool:
    """Whether guidance acts at a time: above scale 1, and within the interval, both ends included."""
    return scale > 1 and interval[0] - ROUNDING <= time <= interval[1] + ROUNDING


def guided_prediction(
    model: Callable[..., Any],
    label_B: torch.Tensor,
    null_label: int,
    scale: float,
    device: torch.device,
    channels: Channels = "all",
    interval: Interval = ALWAYS,
    weak: Callable[..., Any] | None = None,
) -> Predict:
    """The guided model of one batch: p = p_ref + scale * (p_label - p_ref).

    p_ref is the model's own prediction for the null label: one forward of 2B images, the labelled half before the null
    half. Or it is that of a weaker model for the same labels: a forward of B images by each. At scale 1 or below, and
    outside the interval, p is p_label, one forward of the B labelled images.

    Args:
        model: `model(x, t, y).prediction` [2B or B, C or 2C, H, W].
        label_B: int64 on the CPU.
        null_label: the label that stands for "no class".
        device: where x will lie.
        channels: guide all C channels of x or the first 3. The others, and the variance channels past C, are those of
            the labelled half, as DiT samples.
        interval: the times, in 0..1000, in which guidance acts.
        weak: as `model`, of the same classes and sizes.

    Returns:
        `predict(x [B, C, H, W], t)` with the channels of the model's prediction and the dtype of x.
    """
    y_2B = torch.cat([label_B, torch.full_like(label_B, null_label)])

    def forward(which: Callable[..., Any], x: torch.Tensor, time: float, y: torch.Tensor) -> torch.Tensor:
        t = torch.full((len(x),), time, dtype=torch.float32, device=device)
        return which(x, t, y).prediction.to(x.dtype)

    def predict(x_BCHW: torch.Tensor, time: float) -> torch.Tensor:
        if not guides(scale, interval, time):
            return forward(model, x_BCHW, time, label_B)
        if weak is None:
            p_label, p_ref = forward(model, torch.cat([x_BCHW, x_BCHW]), time, y_2B).chunk(2)
        else:
            p_label, p_ref = (forward(which, x_BCHW, time, label_B) for which in (model, weak))
        moved = x_BCHW.shape[1] if channels == "all" else min(channels, x_BCHW.shape[1])
        mixed = p_ref[:, :moved] + scale * (p_label[:, :moved] - p_ref[:, :moved])
        return torch.cat([mixed, p_label[:, moved:]], dim=1)

    return predict
