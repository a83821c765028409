"""Processes that extract features together. The only file of this package that talks to other processes.

Started by torchrun (or what else sets RANK, WORLD_SIZE, LOCAL_RANK and the master's address), each process takes a run
of whole batches, so that a batch holds the same images at every world size, and rank 0 receives all results.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from promoe_ds.config import reject


@dataclass(frozen=True)
class Workers:
    """This process among those that work together; the default is one process alone."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """number on this machine: picks the GPU"""

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


def workers_from(environ: Mapping[str, str]) -> Workers:
    """Read RANK, WORLD_SIZE, LOCAL_RANK; absent means one process. Raises `ConfigError` if they make no sense."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in environ:
        conflict = "each task would score everything: RANK and WORLD_SIZE are not set"
        reject("environment SLURM_STEP_NUM_TASKS", tasks, conflict, "start tasks with slurm/launch.sh, or export them")
    way_out = "start through torchrun, or unset it"
    values = []
    for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = environ.get(key, default)
        if not text.isdecimal():
            reject(key, repr(text), "the environment variable is not a number", way_out)
        values.append(int(text))
    workers = Workers(*values)
    if workers.rank >= workers.world:
        reject("RANK", workers.rank, f"the environment variable is not below WORLD_SIZE={workers.world}", way_out)
    if workers.world > 1 and "RANK" not in environ:
        reject("WORLD_SIZE", workers.world, "is set in the environment without RANK", way_out)
    return workers


@contextlib.contextmanager
def joined(workers: Workers) -> Iterator[Workers]:
    """A gloo group of all processes around the work; nothing for one process."""
    if workers.world == 1:
        yield workers
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    try:
        yield workers
    finally:
        dist.destroy_process_group()
