"""Ranks, groups and the process group. The only file that reads rank variables from the environment."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from promoe_ds.config import reject


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
        ConfigError: a variable is not a number, or srun started several tasks that do not know of each other.
    """
    tasks = _integer("SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        conflict = "each task would train alone: RANK, WORLD_SIZE and MASTER_ADDR are not set"
        reject("environment SLURM_STEP_NUM_TASKS", tasks, conflict, "export them, or start torchrun in one task a node")
    return Topology(rank(), world_size(), _integer("LOCAL_RANK", 0), ep)


def connect(topology: Topology, timeout_minutes: float = 30.0) -> None:
    """Join the process group through DeepSpeed: gloo on CPU, NCCL on CUDA.

    On CPU DeepSpeed would first compile a shared-memory operator for a minute (it serves inference only, and parallel
    jobs race for its build folder): it is marked as not available.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", topology.rank), ("WORLD_SIZE", topology.world), ("LOCAL_RANK", topology.local_rank)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if topology.world == 1:
        os.environ.setdefault("MASTER_PORT", "0")  # any free port: nobody else joins
    import deepspeed

    if torch.distributed.is_initialized():
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(topology.device)
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        verbose=False,
    )


def disconnect() -> None:
    """Leave the process group, together: gloo aborts a rank whose peers close their connections before it does."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
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
