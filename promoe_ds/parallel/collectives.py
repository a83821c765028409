"""Differentiable collectives. They go through `deepspeed.comm`, so DeepSpeed's communication logger sees them.

Those of the forward pass are operators of their own, `promoe_ds::...`, which write to none of their arguments:
selective activation checkpointing (`models/recompute.py`) keeps their results instead of communicating again.
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


def _name(group: Any) -> str:
    """Operators take strings, not groups."""
    name = "" if group is None else group.group_name
    _groups[name] = group
    return name


@torch.library.custom_op("promoe_ds::sum_over_ranks", mutates_args=())
def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    return sum_in_place(x.clone(), _groups[group])


@torch.library.custom_op("promoe_ds::swap_rows", mutates_args=())
def _swap_rows(x: Tensor, send: list[int], receive: list[int], group: str) -> Tensor:
    return _exchange(x, send, receive, _groups[group])


@torch.library.custom_op("promoe_ds::swap_counts", mutates_args=())
def _swap_counts(count: Tensor, group: str) -> Tensor:
    out = torch.empty_like(count)
    with kind("counts"):
        dist.all_to_all_single(out, count.contiguous(), group=_groups[group])
    return out


@torch.library.custom_op("promoe_ds::all_gather_rows", mutates_args=())
def _all_gather_rows(x: Tensor, group: str) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(_groups[group]))]
    with kind("router_sums"):
        dist.all_gather(parts, x, group=_groups[group])
    return torch.cat(parts)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sum_over_ranks(x.detach(), _name(group))

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
    return _all_gather_rows(x.detach().contiguous(), _name(group))


class _SwapRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.splits = (send, receive, group)
        return _swap_rows(x, send, receive, _name(group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.splits
        return _exchange(grads[0], receive, send, group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = x.new_empty(sum(receive), x.shape[1])
    with kind("all_to_all"):
        dist.all_to_all_single(out, x.contiguous(), output_split_sizes=receive, input_split_sizes=send, group=group)
    return out


def swap_rows(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """Uneven all-to-all of rows: `send[r]` consecutive rows go to rank r, `receive[s]` arrive from rank s.

    Zero rows in any place keep the node in the graph, so every rank joins the backward exchange too.
    """
    return _SwapRows.apply(x, send, receive, group)  # type: ignore[no-any-return]


def swap_counts(count: Tensor, group: Any) -> Tensor:
    """[ep, e] integers: row r goes to rank r; row s of the result came from rank s."""
    return _swap_counts(count, _name(group))
