"""The processes of a job: which of them this one is, its device, and how they exchange values. Needs no DeepSpeed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from promoe_ds.config.errors import reject


def number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        way_out = "start with deepspeed, torchrun or slurm/launch.sh, or unset it"
        reject(f"environment {name}", repr(text), "is not a number", way_out)
    return int(text)


def check_accelerator(present: bool = True) -> None:
    """Raises ConfigError for a device that DeepSpeed, which asks for its name when it is imported, would not find.

    Args:
        present: the device must be there; not for a dry run, which may plan for another machine.
    """
    option, name = "environment DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu")
    if name not in ("cpu", "cuda"):
        reject(option, repr(name), "is neither cpu nor cuda", "unset it")
    if present and name == "cuda" and not torch.cuda.is_available():
        reject(option, name, "this machine offers no CUDA device", "unset it")


def cores_per_rank() -> int:
    """CPU cores of this machine that this process may use, shared with the other ranks on it."""
    local = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // max(1, local))


def find_device(name: torch.device | str, option: str, known: str = "cpu, cuda or cuda:N") -> torch.device:
    """The CPU or a GPU. Raises ConfigError, naming `option`, for what is neither, and for a GPU that is not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        reject(option, str(name), "is no device", f"write {known}")
    if device.type == "cpu":
        if device.index:  # torch takes it, safetensors does not
            reject(option, name, "is no device, the CPU has no numbers", f"write {known}")
        return torch.device("cpu")
    if device.type != "cuda":
        reject(option, name, "is not supported", f"write {known}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (device.index or 0):
        reject(option, name, f"this machine offers {count} CUDA devices", "write cpu, or a lower number")
    return device


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; by default it is alone.

    `gather`, `gather_to_first` and `barrier` are collective, and need torch's default process group where there are
    several processes (`parallel.rendezvous.joined`, `parallel.topology.connect`).

    Raises:
        ValueError: the rank is not in [0, world).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """number on this machine: picks the GPU"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of a world of {self.world}")

    @staticmethod
    def from_environment(srun: bool = False) -> Ranks:
        """RANK, WORLD_SIZE and LOCAL_RANK as launchers set them; one process without a launcher.

        Args:
            srun: srun's own numbers will do where those are absent: the processes need not talk to each other.

        Raises:
            ConfigError: one is not a number or absent, the rank is not below the world size, or srun has started
                several tasks that do not know of each other.
        """
        rank_name, world_name = "RANK", "WORLD_SIZE"
        way_out = "start with deepspeed, torchrun or slurm/launch.sh, or export RANK and WORLD_SIZE"
        told, tasks = {rank_name, world_name} & os.environ.keys(), number("SLURM_STEP_NUM_TASKS", 1)
        if srun and not told:
            rank_name, world_name = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
        elif tasks > 1 and len(told) < 2:
            conflict = "each task would do everything: RANK and WORLD_SIZE are not both set"
            reject("environment SLURM_STEP_NUM_TASKS", tasks, conflict, way_out)
        rank, world = number(rank_name, 0), number(world_name, 1)
        if world > 1 and rank_name not in os.environ:
            conflict = f"{world_name}={world} processes cannot be told apart without it"
            reject(f"environment {rank_name}", "(not set)", conflict, way_out)
        if rank >= world:
            reject(f"environment {rank_name}", rank, f"is not below {world_name}={world}", way_out)
        return Ranks(rank, world, number("LOCAL_RANK", number("SLURM_LOCALID", 0)))

    @property
    def device(self) -> torch.device:
        """A GPU of its own, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def pick_device(self, name: str) -> torch.device:
        """What --device names. auto and cuda: this process's GPU; processes in excess of the GPUs share them."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = find_device(name, "--device", "auto, cpu, cuda or cuda:N")
        if device.type == "cpu" or device.index is not None:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank; also a barrier."""
        out: list[Any] = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(out, value)
        return out

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """`value` of every rank, in rank order, on rank 0; None elsewhere. For what is too large to be everywhere."""
        out = [value] * self.world if self.rank == 0 else None
        if self.world > 1:
            torch.distributed.gather_object(value, out)
        return out

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


ALONE = Ranks()


def share_of(ranks: Ranks, num: int, batch: int) -> range:
    """Starts of this process's batches among those of `num` items: consecutive, shares within one batch of another.

    Batches are whole, so that one holds the same images at every world size.
    """
    starts = range(0, num, batch)
    return starts[len(starts) * ranks.rank // ranks.world : len(starts) * (ranks.rank + 1) // ranks.world]
