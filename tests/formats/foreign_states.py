"""Small states under the names that REPA's and SiT's code give them, with values of a formula: alike on every machine.

`tests/golden/foreign_forwards.json` holds what their own code computes with them, in float64 but for the sinusoids of
time: REPA 67f7145 `models/sit.py`, SiT 947f95b `models.py` with timm 1.0.31, torch 2.13.0.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from promoe_ds.models.layers import grid_sinusoids
from tests.formats.official_model import CHANNELS, CLASSES, SIDE, D, shapes
from tests.launch import ROOT

T = 250.0
"""time of the golden forwards, in 0..1000 with noise at 1000"""
LABELS = [1, CLASSES]
PROJECTORS = {"0": (24, D), "2": (24, 24), "4": (16, 24)}


def waves(shape: tuple[int, ...], k: int) -> Tensor:
    """float32, every value between -0.2 and 0.2."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.2 * torch.sin(numbers * 0.7 + numbers.square() * 0.013 + k)).float().view(shape)


def sit_state(channels: int = 2 * CHANNELS) -> dict[str, Tensor]:
    """Of SiT; DiT's names are the same."""
    named = shapes("dense") | {
        "final_layer.linear.weight": (4 * channels, D),
        "final_layer.linear.bias": (4 * channels,),
    }
    state = {name: waves(shape, k) for k, (name, shape) in enumerate(sorted(named.items()))}
    return state | {"pos_embed": grid_sinusoids(D, SIDE // 2)}


def repa_state() -> dict[str, Tensor]:
    """Of REPA, with one projector."""
    state = sit_state(CHANNELS)
    for k, (layer, shape) in enumerate(PROJECTORS.items()):
        state |= {
            f"projectors.0.{layer}.weight": waves(shape, 50 + k),
            f"projectors.0.{layer}.bias": waves(shape[:1], k),
        }
    return state


def images() -> Tensor:
    """float64 [2, C, H, W]."""
    return 5 * waves((2, CHANNELS, SIDE, SIDE), 100).double()


def golden(name: str) -> Tensor:
    """What `name`'s code predicts for `images` and `LABELS` at `T`, [2, C, H, W], in its own sign of the velocity."""
    tree: dict[str, Any] = json.loads((ROOT / "tests/golden/foreign_forwards.json").read_text(encoding="utf-8"))
    return torch.tensor(tree[name], dtype=torch.float64).view(2, CHANNELS, SIDE, SIDE)
