"""Weights in the precision of autocast, cast once per optimizer step where several micro-batches make one.

torch keeps the casts that its operators ask for until an outermost autocast ends: that of a forward pass, or on CUDA
one in the thread of the backward pass. So our layers (`recompute.linear`, `StackedExperts`) ask `cast_weight`, whose
copies live as long as the context.

A copy has one place in the graph, which the gradients of every micro-batch pass, so each reaches the fp32 parameter and
the hooks on it, as ever. Weights must not change while the context is open. A compiled graph casts by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_copies: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None = None
"""weight (held, so that its id stays its own) and copy; None outside `cast_once`"""


@contextmanager
def cast_once() -> Iterator[None]:
    """Around the forward and backward passes of one optimizer step."""
    global _copies
    _copies = {}
    try:
        yield
    finally:
        _copies = None


def casting() -> bool:
    """Whether `cast_once` is open. A compiled graph casts by itself."""
    return _copies is not None and not torch.compiler.is_compiling()


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`; within `cast_once`, the same copy of a trained parameter each time."""
    if _copies is None or weight.dtype == dtype or torch.compiler.is_compiling():
        return weight.to(dtype)
    if not (weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()):
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _copies:
        _copies[key] = weight, weight.to(dtype)
    return _copies[key][1]
