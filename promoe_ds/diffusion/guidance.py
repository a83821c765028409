"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from promoe_ds.config.schema import Channels
from promoe_ds.diffusion.ddpm_samplers import Predict


def guided_prediction(
    model: Callable[..., Any],
    label_B: torch.Tensor,
    null_label: int,
    scale: float,
    device: torch.device,
    channels: Channels = "all",
) -> Predict:
    """The guided model of one batch: p = p_null + scale * (p_label - p_null).

    Above scale 1 every evaluation is one forward of 2B images, the labelled half before the null half; at scale 1 or
    below it is one forward of the B labelled images.

    Args:
        model: `model(x, t, y).prediction` [2B or B, C or 2C, H, W].
        label_B: int64 on the CPU.
        null_label: the label that stands for "no class".
        device: where x will lie.
        channels: guide all C channels of x or the first 3. The others, and the variance channels past C, are those of
            the labelled half, as DiT samples.

    Returns:
        `predict(x [B, C, H, W], t)` with the channels of the model's prediction and the dtype of x.
    """
    guided = scale > 1
    y = torch.cat([label_B, torch.full_like(label_B, null_label)]) if guided else label_B

    def predict(x_BCHW: torch.Tensor, time: float) -> torch.Tensor:
        x = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        t = torch.full((len(x),), time, dtype=torch.float32, device=device)
        p = model(x, t, y).prediction.to(x.dtype)
        if not guided:
            return p
        moved = x.shape[1] if channels == "all" else min(channels, x.shape[1])
        p_label, p_null = p.chunk(2)
        mixed = p_null[:, :moved] + scale * (p_label[:, :moved] - p_null[:, :moved])
        return torch.cat([mixed, p_label[:, moved:]], dim=1)

    return predict
