"""Small tensors that never change, made once a device: a layer that makes its own launches a kernel for each.

Nobody may write to them. Made outside inference mode, so that training may keep them after sampling made them first.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def counting(number: int, device: torch.device, repeats: int = 1) -> Tensor:
    """0, 1 .. number-1, each `repeats` times; int64 [number * repeats]."""
    with torch.inference_mode(False):
        return torch.arange(number, device=device).repeat_interleave(repeats)


@lru_cache(maxsize=16)
def unit_rows(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[number, number], row i the i-th unit vector: its rows, picked by index, are a 0/1 membership matrix."""
    with torch.inference_mode(False):
        return torch.eye(number, dtype=dtype, device=device)
