"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from promoe_ds.diffusion.rectified_flow import TIME_SCALE
from promoe_ds.diffusion.samplers import Velocity
from promoe_ds.moe.routing import RoutingContext


def guided_velocity(
    model: Callable[..., Any], label_B: torch.Tensor, null_label: int, scale: float, device: torch.device
) -> Velocity:
    """The velocity field of one batch: v = v_null + scale * (v_label - v_null).

    Above scale 1 every evaluation is one forward of 2B images, the labelled half before the null half; at scale 1 or
    below it is one forward of the B labelled images. The routing context depends on the labels alone, so it is built
    here, once a batch, and not at every step.

    Args:
        model: `model(x, t, context).prediction` [2B or B, C or more, H, W]; channels past those of x are dropped.
        label_B: int64 on the CPU.
        null_label: the label that stands for "no class".
        device: where x will lie.

    Returns:
        `velocity(x [B, C, H, W], sigma)` with the shape and dtype of x.
    """
    guided = scale > 1
    label = torch.cat([label_B, torch.full_like(label_B, null_label)]) if guided else label_B
    context = RoutingContext.build(label, null_label, device)

    def velocity(x_BCHW: torch.Tensor, sigma: float) -> torch.Tensor:
        x = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        t = torch.full((len(x),), TIME_SCALE * sigma, dtype=torch.float32, device=device)
        v = model(x, t, context).prediction[:, : x.shape[1]].to(x.dtype)
        if not guided:
            return v
        v_label, v_null = v.chunk(2)
        return v_null + scale * (v_label - v_null)

    return velocity
