"""Processes that extract features together. The only file of this package that talks to other processes.

Each process takes a run of whole batches, so that a batch holds the same images at every world size, and rank 0
receives all results, through the process group that the caller has made (launchers/evaluate.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Workers:
    """This process among those that work together; the default is one process alone."""

    rank: int = 0
    world: int = 1

    def share(self, num: int, batch: int) -> range:
        """Starts of this process's batches among those of `num` items: consecutive, whole, shares within one batch."""
        starts = range(0, num, batch)
        return starts[len(starts) * self.rank // self.world : len(starts) * (self.rank + 1) // self.world]

    def gather(self, part: Any) -> list[Any] | None:
        """Every process's part in order of rank, on rank 0; None elsewhere. Every process must call it."""
        if self.world == 1:
            return [part]
        import torch.distributed as dist  # only where several processes work together

        parts = [None] * self.world if self.rank == 0 else None
        dist.gather_object(part, parts)
        return parts
