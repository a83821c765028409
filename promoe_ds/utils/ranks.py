"""Processes that share a job without DeepSpeed: who this one is, and its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from promoe_ds.config.schema import reject

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
SLURM = {"SLURM_PROCID": "RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}
"""what srun calls them"""


@dataclass(frozen=True)
class Worker:
    """This process among those that share a job."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """number on this machine: picks the GPU"""


def worker_from(environ: Mapping[str, str], srun: bool = False) -> Worker:
    """Read RANK, WORLD_SIZE, LOCAL_RANK as torchrun and the deepspeed launcher set them; absent means one process.

    Args:
        srun: where they are absent, take srun's own numbers: for jobs whose processes need not talk to each other.

    Raises:
        ConfigError: they are no integers, or the rank is not below the world size.
    """
    if srun and not any(key in environ for key in LAUNCHER):
        environ = {ours: environ[theirs] for theirs, ours in SLURM.items() if theirs in environ}
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not srun and tasks != "1" and "RANK" not in environ:
        conflict = "each task would make everything: RANK and WORLD_SIZE are not set"
        reject("environment SLURM_STEP_NUM_TASKS", tasks, conflict, "start tasks with slurm/launch.sh, or export them")
    way_out = "start through torchrun or the deepspeed launcher, or unset it"
    values = []
    for key, default in LAUNCHER.items():
        text = environ.get(key, default)
        if not text.isdecimal():
            reject(key, repr(text), "the environment variable is not a number", way_out)
        values.append(int(text))
    worker = Worker(*values)
    if worker.rank >= worker.world:
        reject("RANK", worker.rank, f"the environment variable is not below WORLD_SIZE={worker.world}", way_out)
    if worker.world > 1 and "RANK" not in environ:
        reject("WORLD_SIZE", worker.world, "is set in the environment without RANK", way_out)
    return worker


def pick_device(name: str, worker: Worker) -> torch.device:
    """auto and cuda: this process's GPU by LOCAL_RANK; processes in excess of the GPUs share them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        reject("--device", name, "is no device", "write auto, cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        reject("--device", name, "is not supported", "write auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (device.index or 0):
        reject("--device", name, f"this machine offers {count} CUDA devices", "write cpu or auto, or a lower number")
    return device if device.index is not None else torch.device("cuda", worker.local % count)
