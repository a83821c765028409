"""Ranks, groups and the process group. The only file that reads rank variables from the environment."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from promoe_ds.config.schema import reject
from promoe_ds.parallel import rendezvous
from promoe_ds.parallel.watchdog import Watchdog, is_consequence

_watchdog: Watchdog | None = None


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Expert-parallel groups are consecutive ranks, so they stay inside a node."""

    rank: int
    world: int
    local_rank: int
    ep: int

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    @property
    def expert_data_parallel(self) -> int:
        """Replicas of each routed expert; its gradients are reduced over these ranks."""
        return self.world // self.ep

    def ep_groups(self) -> list[list[int]]:
        return [list(range(start, start + self.ep)) for start in range(0, self.world, self.ep)]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        reject(f"environment {name}", repr(text), "is not an integer", "start with deepspeed or torchrun")


def world_size() -> int:
    """Processes of this job; 1 without a launcher."""
    return _integer("WORLD_SIZE", 1)


def rank() -> int:
    return _integer("RANK", 0)


def from_environment(ep: int) -> Topology:
    """The topology given by the launcher (RANK, WORLD_SIZE, LOCAL_RANK); a single process without one.

    Raises:
        ConfigError: a variable is not a number, out of range or missing, or srun started several tasks that do not
            know of each other.
    """
    tasks = _integer("SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        conflict = "each task would train alone: RANK, WORLD_SIZE and MASTER_ADDR are not set"
        reject("environment SLURM_STEP_NUM_TASKS", tasks, conflict, "start ranks with slurm/launch.sh, or export them")
    here = Topology(rank(), world_size(), _integer("LOCAL_RANK", _integer("SLURM_LOCALID", 0)), ep)
    if not 0 <= here.rank < here.world:
        reject(
            "environment RANK", here.rank, f"is not below WORLD_SIZE={here.world}", "start with deepspeed or torchrun"
        )
    if here.world > 1:
        rendezvous.address(here.world)
    return here


def connect(topology: Topology, timeout_minutes: float = 30.0, meeting_minutes: float | None = None) -> None:
    """Make the process group, gloo on CPU, NCCL on CUDA, and give it to DeepSpeed.

    The timeout is that of every group that DeepSpeed or we make from it, and of the first meeting of the ranks unless
    `meeting_minutes` says otherwise. Raises ConfigError where they cannot meet.

    From here on the end of one rank ends all (`watchdog`): within moments if its process or machine is gone, within the
    timeout if it stands still, alone in or out of a collective.

    On CPU DeepSpeed would first compile a shared-memory operator for a minute (it serves inference only, and parallel
    jobs race for its build folder): it is marked as not available.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", topology.rank), ("WORLD_SIZE", topology.world), ("LOCAL_RANK", topology.local_rank)):
        os.environ.setdefault(name, str(value))
    import deepspeed
    from deepspeed.comm import comm

    if torch.distributed.is_initialized():
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(topology.device)
    cuda, timeout = topology.device.type == "cuda", datetime.timedelta(minutes=timeout_minutes)
    rendezvous.join(
        "nccl" if cuda else "gloo",
        topology.rank,
        topology.world,
        timeout_minutes,
        timeout_minutes if meeting_minutes is None else meeting_minutes,
        topology.device if cuda and topology.world > 1 else None,
    )
    deepspeed.init_distributed(verbose=False)
    # torch's groups do not inherit the timeout, and DeepSpeed names none
    comm.cdb.new_group = functools.partial(torch.distributed.new_group, timeout=timeout)
    if topology.world > 1:
        _watch(topology, 60 * timeout_minutes)


def _watch(topology: Topology, timeout: float) -> None:
    global _watchdog
    speaker = topology.local_rank == 0 or topology.rank == 1  # some process of every machine but rank 0 itself
    share = lambda value: gather_objects(value, topology)[0]  # noqa: E731
    _watchdog = Watchdog(topology.rank, topology.world, share, os.environ["MASTER_ADDR"], timeout, speaker)


def watched() -> bool:
    """Whether other ranks will learn of this one's end."""
    return _watchdog is not None


def fail(text: str, code: int) -> int:
    """This rank cannot go on: end all ranks with `code`, and with one line on stderr, from rank 0.

    If several ranks fail at about the same time, the likeliest cause is told, and its code is that of every rank.
    Returns `code` if the process is the only one.
    """
    if _watchdog is not None:
        _watchdog.failed(text, code)
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code if world_size() == 1 else leave(code)


def crash(error: Exception, topology: Topology) -> int:
    """`fail` with an error that nobody foresaw: its traceback too, unless it looks like an echo of another rank's."""
    text = f"rank {topology.rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if topology.world == 1 or not is_consequence(text):
        traceback.print_exception(error)
    return fail(text, 1)


def disconnect() -> None:
    """Leave the process group, together: gloo aborts a rank whose peers close their connections before it does."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if _watchdog is not None:
            _watchdog.close()
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process of several at once, flushed but without destructors.

    At interpreter exit gloo's threads now and then abort a rank ("terminate called without an active exception"), which
    would turn a finished run into a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier(topology: Topology) -> None:
    if topology.world > 1:
        torch.distributed.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place, not differentiable."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def gather_objects(value: Any, topology: Topology) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    out: list[Any] = [value] * topology.world
    if topology.world > 1:
        torch.distributed.all_gather_object(out, value)
    return out
