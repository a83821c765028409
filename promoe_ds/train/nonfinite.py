"""Where a loss or gradient that is not finite comes from.

Steps are pure functions, so nothing is recorded while all is well: a bad step is computed once more with a `Probe` on
the model. It looks at each module's output and at the gradient of each parameter as autograd makes them, before any
reduction: that works alike at every ZeRO stage and under expert parallelism. Ranks then compare what they saw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from promoe_ds.moe.observe import hooked

SKIPS_IN_A_ROW = 10
"""steps without an update after which `train.on_nonfinite=skip` gives up"""


class TrainingStopped(Exception):
    """The run cannot go on (not a user's mistake); raised on every rank alike; the message is one line."""


class RankFailed(Exception):
    """A user's mistake that one rank alone has met (a damaged file); the message is one line."""


class StoppedEarly(Exception):
    """A signal came before the first step; raised on every rank alike, after the marker is written."""


@dataclass(frozen=True)
class Findings:
    """What one rank saw in the repeated step."""

    order: int | None
    """number of module calls before the first bad output (0: the data themselves are bad); None if all were good"""
    module: str
    """name of that module; of bad data, the path of the first bad item, "" where it has none"""
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """parameter -> (values of its gradient that are not finite, values), where there is a bad one"""


class Probe(ExitStack):
    """While the context is open, watch the forwards and backwards of `model`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.calls, self.first = 0, Findings(None, "")
        self.bad: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        modules, parameters = self.model.named_modules(), self.model.named_parameters()
        outputs = [m.register_forward_hook(partial(self._output, name or "the model")) for name, m in modules]
        gradients = [p.register_hook(partial(self._gradient, name)) for name, p in parameters if p.requires_grad]
        self.enter_context(hooked([*outputs, *gradients]))
        return self

    def data(self, images: Iterable[Tensor], path: Callable[[int, int], str] = lambda batch, item: "") -> None:
        """Look at the images themselves, [B, ...] of each micro-batch, before the first forward.

        Args:
            path: (micro-batch, position in it) -> where that image comes from.
        """
        for batch, x in enumerate(images):
            bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero()
            if len(bad):
                self.first = Findings(0, path(batch, int(bad[0])))
                return

    def _output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.calls += 1
        if self.first.order is None and any(not bool(torch.isfinite(x).all()) for x in _tensors(output)):
            self.first = Findings(self.calls, name)

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if bad := int((~torch.isfinite(gradient)).sum()):
            before = self.bad.get(name, (0, 0))
            self.bad[name] = (before[0] + bad, before[1] + gradient.numel())

    def findings(self) -> Findings:
        return Findings(self.first.order, self.first.module, self.bad)


def _tensors(output: Any) -> Iterable[Tensor]:
    """Floating tensors of a module's output, one level deep."""
    values = output if isinstance(output, tuple | list) else getattr(output, "__dict__", {"": output}).values()
    return [x for x in (output, *values) if isinstance(x, Tensor) and x.is_floating_point()]


def culprit(names: list[str], values_by_rank: list[list[float]]) -> str:
    """ "rank 1: loss/diffusion is nan", or "" if all values are finite.

    The first name, the total, is looked at last: a loss of global scope is bad on every rank if it is on one.
    """
    for i in (*range(1, len(names)), 0):
        for rank, values in enumerate(values_by_rank):
            if not math.isfinite(values[i]):
                return f"rank {rank}: {names[i]} is {values[i]}"
    return ""


def place(by_rank: list[Findings]) -> str:
    """The worst layer in words: the first module with a bad output, else the gradient with the most bad values."""
    if outputs := [(f.order, rank, f.module) for rank, f in enumerate(by_rank) if f.order is not None]:
        order, rank, name = min(outputs)
        if order == 0:
            return f"first seen in the images on rank {rank}{name and f': {name}'}"
        return f"first seen in the output of {name} on rank {rank}"
    bad = Counter({name: 0 for found in by_rank for name in found.bad})
    for found in by_rank:
        bad.update({name: count for name, (count, _) in found.bad.items()})
    if not bad:
        return "no layer's output or gradient shows it when the step is repeated: sums over ranks or values overflow"
    name = max(sorted(bad), key=lambda name: bad[name])
    ranks = [rank for rank, found in enumerate(by_rank) if name in found.bad]
    of = sum(by_rank[rank].bad[name][1] for rank in ranks)
    where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
    return f"outputs are finite; most of it is in the gradient of {name} ({bad[name]} of {of} values on {where})"
