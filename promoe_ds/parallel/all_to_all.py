"""The all-to-all of expert parallelism: rows of tokens go to the ranks that hold their experts, and come back.

Differentiable, asynchronous and uneven: first each pair of ranks tells how many rows it will exchange
(`all_to_all_counts`), then the rows travel (`AllToAllHandle`). Both go through `deepspeed.comm`, so DeepSpeed's
communication logger sees them, and both are operators of their own, `promoe_ds::...`, which write to none of their
arguments: selective activation checkpointing (`models/activation_checkpoint.py`) keeps their results and does not
communicate again.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from promoe_ds.parallel.collectives import group_of, name_of
from promoe_ds.parallel.meter import kind

# The all-to-all of rows has four moments. Other work is done between 1 and 2, and between 3 and 4:
#
#   1  rows are sent       `AllToAllHandle(...)`
#   2  rows are received   `AllToAllHandle.wait()`
#   3  gradients leave     backward of 2
#   4  gradients arrive    backward of 1
#
# To autograd, 1 is the identity and 2 is the exchange. The gradient of an exchange is the exchange the other way round:
# 3 returns exactly that, in a buffer that is still being filled, and 4 hands it on once it is full. Nothing reads the
# buffer in between (but autograd's anomaly mode): the output of 1 stays in the handle, and only 2 uses it.


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Any) -> tuple[Tensor, Any]:
    """Start an exchange -> (buffer [sum(receive), D], the work to wait for before it is read)."""
    out = x.new_empty(sum(receive), x.shape[1])
    with kind("all_to_all"):
        work = dist.all_to_all_single(
            out, x.contiguous(), output_split_sizes=receive, input_split_sizes=send, group=group, async_op=True
        )
    return out, work


_started: list[Any] = []
"""the work of the exchange just started, for `_Send` to take: an operator can only return tensors. Empty if selective
checkpointing gave back the rows it kept instead of starting one"""


@torch.library.custom_op("promoe_ds::all_to_all_rows", mutates_args=())
def _all_to_all_rows(x: Tensor, send: list[int], receive: list[int], group: str) -> Tensor:
    out, work = _exchange(x, send, receive, group_of(group))
    _started.append(work)
    return out


class _Send(torch.autograd.Function):
    """Moments 1 and 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: AllToAllHandle) -> Tensor:
        ctx.handle = handle
        handle.rows = _all_to_all_rows(x, handle.send, handle.receive, name_of(handle.group))
        handle.work = _started.pop() if _started else None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.handle.finish()
        return grads[0], None


class _Receive(torch.autograd.Function):
    """Moments 2 and 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: AllToAllHandle) -> Tensor:
        ctx.handle = handle
        handle.finish()
        rows, handle.rows = handle.rows, None  # the graph keeps the handle, which must not keep the rows
        return rows  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        handle = ctx.handle
        grad, handle.work = _exchange(grads[0], handle.receive, handle.send, handle.group)
        return grad, None


class AllToAllHandle:
    """An uneven all-to-all of rows under way, differentiable; `wait` returns the rows received.

    Zero rows anywhere keep both nodes in the graph, so every rank joins the backward exchange too.

    Args:
        x: [sum(send), D]; `send[r]` consecutive rows go to rank r.
        receive: `receive[s]` rows come from rank s.
    """

    def __init__(self, x: Tensor, send: list[int], receive: list[int], group: Any):
        self.send, self.receive, self.group = send, receive, group
        self.rows: Tensor | None = None
        self.work: Any = None
        self.sent: Tensor | None = _Send.apply(x, self)

    def wait(self) -> Tensor:
        """[sum(receive), D] in rank order. Call it once; on CUDA the stream waits, not the host."""
        assert self.sent is not None, "already waited for: a second exchange of gradients would replace the first"
        sent, self.sent = self.sent, None
        return _Receive.apply(sent, self)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Wait for the work under way, of rows or of gradients."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()


@torch.library.custom_op("promoe_ds::all_to_all_counts", mutates_args=())
def _swap_counts(count: Tensor, group: str) -> Tensor:
    out = torch.empty_like(count)
    with kind("counts"):
        dist.all_to_all_single(out, count.contiguous(), group=group_of(group))
    return out


def all_to_all_counts(count: Tensor, group: Any) -> Tensor:
    """[ep, e] integers: row r goes to rank r; row s of the result came from rank s."""
    return _swap_counts(count, name_of(group))
