"""Sums over ranks, differentiable, and gathers, which are not; the experts' exchange of tokens is in `all_to_all.py`.

All go through `deepspeed.comm`, so DeepSpeed's communication logger sees them. Those of the forward pass are operators
of their own, `promoe_ds::...`, which write to none of their arguments: selective activation checkpointing
(`models/activation_checkpoint.py`) keeps their results and does not communicate again.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from promoe_ds.parallel.meter import kind


def sum_in_place(x: Tensor, group: Any = None, what: str = "router_sums") -> Tensor:
    """The sum of x over the ranks of a group, in place, not differentiable; `what` is its kind for the meter."""
    with kind(what):
        dist.all_reduce(x, group=group)
    return x


_groups: dict[str, Any] = {}


def name_of(group: Any) -> str:
    """Register a process group; returns the name by which an operator, which takes strings only, finds it again."""
    name = "" if group is None else group.group_name
    _groups[name] = group
    return name


def group_of(name: str) -> Any:
    """The process group that `name_of` gave this name."""
    return _groups[name]


@torch.library.custom_op("promoe_ds::sum_over_ranks", mutates_args=())
def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    return sum_in_place(x.clone(), group_of(group))


@torch.library.custom_op("promoe_ds::all_gather_rows", mutates_args=())
def _all_gather_rows(x: Tensor, group: str) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group_of(group)))]
    with kind("router_sums"):
        dist.all_gather(parts, x, group=group_of(group))
    return torch.cat(parts)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sum_over_ranks(x.detach(), name_of(group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_in_place(grads[0].clone(), ctx.group), None


def all_reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Sum over ranks; the gradient is the sum of the ranks' gradients.

    If each rank computes the same loss from the sum and gradients are averaged over ranks (as DeepSpeed does), the
    result is the gradient of that one loss.
    """
    return _AllReduceSum.apply(x, group)  # type: ignore[no-any-return]


def all_gather_rows(x: Tensor, group: Any = None) -> Tensor:
    """[n, ...] of every rank, the same shape on all -> [W*n, ...] in rank order; not differentiable."""
    return _all_gather_rows(x.detach().contiguous(), name_of(group))
