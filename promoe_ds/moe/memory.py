"""Arithmetic in memory that is there already, where no gradient needs what was in it.

Sampling makes no gradient, and its elementwise work is bound by memory: a result that takes the place of an operand
spares the pages of a new one. Results are the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def may_overwrite(x: Tensor, *others: Tensor) -> bool:
    """Whether the result of arithmetic on x and others may be written over x, which must be nobody else's."""
    return not torch.is_grad_enabled() and all(torch.result_type(x, other) == x.dtype for other in others)


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, over x if it may be."""
    return x.add_(y) if may_overwrite(x, y) else x + y


def times(x: Tensor, y: Tensor) -> Tensor:
    """x * y, over x if it may be."""
    return x.mul_(y) if may_overwrite(x, y) else x * y
