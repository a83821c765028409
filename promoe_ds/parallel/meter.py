"""What a step spends: seconds by part, and the bytes that collectives send, by kind (`train.measure=true`).

Seconds are exclusive: an all-to-all inside the backward pass counts as all-to-all, not as backward. Every change of
part waits for the device, and nothing is computed while rows travel, so measuring costs speed. Bytes are counted where
DeepSpeed calls its communication backend, so its own gradient and parameter traffic is seen too:

    all_to_all       what leaves the rank (its share for itself does not)
    all_reduce       2 (n-1)/n of the tensor per rank, the ring's and the lower bound
    reduce_scatter, all_gather, reduce, broadcast      (n-1)/n of the whole tensor per rank

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
    """Counts from its making or the last `reset` on; `report` reads. One per process.

    Args:
        model: its experts are timed by hooks, so none may be inside a graph (`compile_model(whole=False)`).
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self.stack: list[str] = ["other"]
        self.reset()
        for module in model.modules():
            experts = [part for part in module.modules() if isinstance(part, StackedExperts)]
            assert not experts or "forward" not in vars(module), "a graph calls no hooks: compile_model(whole=False)"
            if experts == [module]:
                self._time(experts[0])
        backend = backend_module.cdb
        if backend is not None and dist.get_world_size() > 1:
            for name in _ARGUMENTS:
                setattr(backend, name, self._counted(name, getattr(backend.__class__, name).__get__(backend)))

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

    def report(self, steps: int, sum_over_ranks: Callable[[Tensor], Tensor], world: int) -> dict[str, float]:
        """Since `reset`, per step: seconds by PARTS, the mean over ranks, and bytes by KINDS, their sum; collective."""
        self._charge()
        mine = torch.tensor([*self.seconds.values(), *self.sent.values()], dtype=torch.float64) / max(steps, 1)
        values = iter(sum_over_ranks(mine.to(self.device)).tolist())
        seconds = {f"seconds/{name}": next(values) / world for name in PARTS}
        return seconds | {f"bytes/{name}": next(values) for name in KINDS}

    def _time(self, experts: StackedExperts) -> None:
        """The forward and, by marks on its input and output, the backward pass."""

        def before(_: nn.Module, args: tuple[ExpertRows]) -> tuple[ExpertRows]:
            rows = args[0]._replace(x_ND=_Mark.apply(args[0].x_ND, self.leave))
            self.enter("experts")
            return (rows,)

        def after(_: nn.Module, args: tuple[ExpertRows], y_ND: Tensor) -> Tensor:
            self.leave()
            return _Mark.apply(y_ND, lambda: self.enter("experts"))  # type: ignore[no-any-return]

        # Next to the forward: ZeRO-3 gathers weights and lets them go in hooks of its own.
        experts.register_forward_pre_hook(before)
        experts.register_forward_hook(after, prepend=True)

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
