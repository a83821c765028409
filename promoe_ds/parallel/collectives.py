"""Differentiable collectives. They go through `deepspeed.comm`, so DeepSpeed's communication logger sees them.

Those of the forward pass are operators of their own, `promoe_ds::...`, which write to none of their arguments:
selective activation checkpointing (`models/recompute.py`) keeps their results instead of communicating again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
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


_travelling: dict[int, tuple[Any, Tensor]] = {}
"""exchanges that nobody has waited for yet: by ticket, the handle and the rows that are being read"""
_tickets = itertools.count()


@torch.library.custom_op("promoe_ds::swap_rows", mutates_args=())
def _swap_rows(x: Tensor, send: list[int], receive: list[int], group: str, ticket: int) -> Tensor:
    """Returns at once; `_arrived(ticket)` before the result is read."""
    x, out = x.contiguous(), x.new_empty(sum(receive), x.shape[1])
    with kind("all_to_all"):
        work = dist.all_to_all_single(
            out, x, output_split_sizes=receive, input_split_sizes=send, group=_groups[group], async_op=True
        )
    _travelling[ticket] = work, x
    return out


def _arrived(ticket: int) -> None:
    """Wait (on CUDA: the stream does). No exchange has this ticket where recomputation got its result from before."""
    work, _ = _travelling.pop(ticket, (None, None))
    if work is not None:
        work.wait()


class _Journey:
    """One exchange and, in the backward pass, the one that brings the gradients back."""

    def __init__(self, send: list[int], receive: list[int], group: Any):
        self.send, self.receive, self.group, self.ticket = send, receive, _name(group), next(_tickets)
        self.back: tuple[Tensor, int] | None = None
        self.over = False

    def begin(self, x: Tensor) -> Tensor:
        return _swap_rows(x, self.send, self.receive, self.group, self.ticket)

    def end(self) -> None:
        assert not self.over, "rows arrive once: the gradients of a second arrival would replace those of the first"
        self.over = True
        _arrived(self.ticket)

    def begin_back(self, grad: Tensor) -> None:
        ticket = next(_tickets)
        self.back = _swap_rows(grad, self.receive, self.send, self.group, ticket), ticket

    def end_back(self) -> Tensor:
        assert self.back is not None, "gradients arrive after they left"
        (grad, ticket), self.back = self.back, None
        _arrived(ticket)
        return grad


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.begin(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.end_back(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.end()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.begin_back(grads[0])
        return grads[0], None  # to `_Leave`, which takes what comes back from the journey instead


def swap_rows(x: Tensor, send: list[int], receive: list[int], group: Any) -> Callable[[], Tensor]:
    """Uneven all-to-all of rows: `send[r]` consecutive rows go to rank r, `receive[s]` arrive from rank s.

    It begins at once, and the result waits for it when called. Backwards likewise: gradients leave when they reach the
    end of the exchange and are waited for at its beginning; autograd does what was done in between meanwhile.
    Zero rows in any place keep the nodes in the graph, so every rank joins the backward exchange too.
    """
    journey = _Journey(send, receive, group)
    arriving = _Leave.apply(x, journey)
    return lambda: _Arrive.apply(arriving, journey)  # type: ignore[return-value]


def swap_counts(count: Tensor, group: Any) -> Tensor:
    """[ep, e] integers: row r goes to rank r; row s of the result came from rank s."""
    return _swap_counts(count, _name(group))
