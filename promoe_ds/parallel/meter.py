"""What a step spends: seconds by part, and the bytes that collectives send, by kind (`train.measure=true`).

Seconds are exclusive: an all-to-all inside the backward pass counts as all-to-all, not as backward. Every change of
part waits for the device, and nothing is computed while rows travel, so measuring costs speed. Bytes are counted where
DeepSpeed calls its communication backend, so its own gradient and parameter traffic is seen too:

    all_to_all       what leaves the rank (its share for itself does not)
    all_reduce       2 (n-1)/n of the tensor a rank, the ring's and the lower bound
    reduce_scatter, all_gather, reduce, broadcast      (n-1)/n of the whole tensor a rank

Summed over the ranks of a group these are whole numbers. n is the size of the group.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.comm as dist
import deepspeed.comm.comm as backend_module
import torch
from torch import Tensor, nn

from promoe_ds.costs.comm_volume import KINDS, PARTS
from promoe_ds.moe.dispatch import ExpertRows
from promoe_ds.moe.experts import StackedExperts

SCALAR_BYTES = 64

_ARGUMENTS = {
    "all_reduce": ("tensor", "op", "group"),
    "reduce": ("tensor", "dst", "op", "group"),
    "reduce_scatter_tensor": ("output_tensor", "input_tensor", "op", "group"),
    "all_gather": ("tensor_list", "tensor", "group"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor", "group"),
    "broadcast": ("tensor", "src", "group"),
    "all_to_all_single": ("output", "input", "output_split_sizes", "input_split_sizes", "group"),
}
"""methods of deepspeed 0.19.8's backend that carry training traffic, with their arguments by position"""
_PART_OF = {"counts": "all_to_all", "scalars": "gradients"}
_kinds: list[str] = []


@contextlib.contextmanager
def kind(name: str) -> Iterator[None]:
    """Collectives within are of this kind; without it they are DeepSpeed's own."""
    _kinds.append(name)
    try:
        yield
    finally:
        _kinds.pop()


class Meter:
    """Counts from `install` or the last `reset` on; `report` reads. One a process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stack: list[str] = ["other"]
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.sent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.since = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def skip(self) -> None:
        """What passed since the last change of part (a checkpoint, a sample grid) is no part of a step."""
        self.since = self._now()

    def enter(self, part: str) -> None:
        self._charge()
        self.stack.append(part)

    def leave(self) -> None:
        self._charge()
        self.stack.pop()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within is of this part, but for parts within."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def report(self, steps: int) -> Tensor:
        """Since `reset`, a step: seconds by PARTS, then bytes this rank sent by KINDS; float64, on the CPU."""
        self._charge()
        return torch.tensor([*self.seconds.values(), *self.sent.values()], dtype=torch.float64) / max(steps, 1)

    # ------------------------------------------------------------------------------------------------ installation

    def install(self, model: nn.Module) -> Meter:
        """Watch the experts of a model and, in a job of several processes, the communication backend."""
        for module in model.modules():
            if isinstance(module, StackedExperts):
                self._watch(module)
        backend = backend_module.cdb
        if backend is not None and dist.get_world_size() > 1:
            for name in _ARGUMENTS:
                setattr(backend, name, self._counted(name, getattr(backend.__class__, name).__get__(backend)))
        return self

    def _watch(self, experts: StackedExperts) -> None:
        """Time the forward and, by marks on its input and output, the backward pass."""
        forward = experts.forward

        def timed(rows: ExpertRows) -> Tensor:
            rows = rows._replace(x_ND=_Mark.apply(rows.x_ND, self.leave))
            with self.part("experts"):
                y_ND = forward(rows)
            return _Mark.apply(y_ND, lambda: self.enter("experts"))  # type: ignore[no-any-return]

        experts.forward = timed  # type: ignore[method-assign]

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            payload, share = _sent(name, dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs)
            if _kinds:
                what = _kinds[-1]
            elif payload <= SCALAR_BYTES:
                what = "scalars"
            else:
                what = "gradients" if "reduce" in name else "parameters"
            self.sent[what] += share
            with self.part(_PART_OF.get(what, what)):
                work = call(*args, **kwargs)
                if hasattr(work, "wait"):
                    work.wait()  # what travels beside other work is measured by itself
                return work

        return counted


def _sent(name: str, given: dict[str, Any]) -> tuple[int, float]:
    """(bytes of the whole tensor, bytes this rank sends) of a call of the backend with these arguments."""
    group = given.get("group")
    n = dist.get_world_size(group)
    if name == "all_to_all_single":
        x, splits = given["input"], given.get("input_split_sizes")
        stays = splits[dist.get_rank(group)] if splits else len(x) // n
        row_bytes = x.nbytes // len(x) if len(x) else 0
        return x.nbytes, float(x.nbytes - stays * row_bytes)
    if name == "all_gather":
        payload = sum(part.nbytes for part in given["tensor_list"])
    else:
        whole = {"all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input_tensor"}.get(name, "tensor")
        payload = given[whole].nbytes
    return payload, (2 if name == "all_reduce" else 1) * payload * (n - 1) / n


class _Mark(torch.autograd.Function):
    """The identity; calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return grads[0], None
