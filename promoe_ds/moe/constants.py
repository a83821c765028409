"""Small tensors that never change, made once per device: a layer that makes its own launches a kernel for each.

Nobody may write to them. Made outside inference mode, so that training may keep them after sampling made them first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make each once; in a compiled graph they are constants, which the compiler folds into what uses them."""
    remembered = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return make(*args, **kwargs) if torch.compiler.is_compiling() else remembered(*args, **kwargs)

    return get


@kept
def cached_arange(number: int, device: torch.device, repeats: int = 1) -> Tensor:
    """0, 1 .. number-1, each `repeats` times; int64 [number * repeats]."""
    with torch.inference_mode(False):
        return torch.arange(number, device=device).repeat_interleave(repeats)


@kept
def unit_rows(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[number, number], row i the i-th unit vector: its rows, picked by index, are a 0/1 membership matrix."""
    with torch.inference_mode(False):
        return torch.eye(number, dtype=dtype, device=device)
