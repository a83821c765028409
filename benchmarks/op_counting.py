"""Operators and host synchronisations of a piece of work, counted as it runs.

Operators are what reaches the dispatcher below autograd: kernels, and views, which cost host time only. A host
synchronisation is a wait of the host for the device: on CUDA what torch reports, elsewhere the operators that would
wait on CUDA: a scalar read, `nonzero`, an index by a boolean mask.

Count a forward pass with gradients off: what autograd keeps of an operator's own result shows here as a `detach`,
which the dispatcher never sees.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset({"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2"})


class OperatorCount(TorchDispatchMode):
    """While the context is open: operators by name, and how many of them wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        masked = name in ("index", "index_put_", "index_put") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        self.syncs += name in _READS or masked
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.names.total()


def count_operators(work: Callable[[], object]) -> OperatorCount:
    with OperatorCount() as count:
        work()
    return count


def host_syncs(work: Callable[[], object], device: torch.device) -> int:
    """Waits of the host within `work`; run it once before, so that nothing is set up within."""
    if device.type != "cuda":
        return count_operators(work).syncs
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(tells_of_a_sync(str(w.message)) for w in seen)


def tells_of_a_sync(message: str) -> bool:
    """Whether a warning is of an operation, and not torch's own about the debug mode, once per process."""
    return "called a synchronizing" in message
