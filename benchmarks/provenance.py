"""Command, commit, versions and device: the head of every page under results/."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def nodes_of(world: int) -> int:
    """Nodes that so many ranks take in this Slurm job (slurm/common.sh exports its ranks a node); 1 elsewhere."""
    per_node = os.environ.get("TASKS_PER_NODE", "") if "SLURM_JOB_ID" in os.environ else ""
    return -(-world // int(per_node)) if per_node.isdecimal() and int(per_node) else 1


def device_name(world: int = 1) -> str:
    """The GPUs, or the CPU cores this process may use and torch's threads; of the first node, where ranks take more."""
    import torch

    nodes = nodes_of(world)
    of = f"{nodes} nodes, the first: " if nodes > 1 else ""
    if torch.cuda.is_available():
        return f"{of}{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{of}{cores} virtual {platform.machine()} CPU cores, {threads} thread(s), shared machine"


def facts(world: int = 1) -> dict[str, str]:
    """Commit, versions, and device of so many ranks; `commit` ends in + where the tree differs from it."""
    import deepspeed
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    return {"commit": commit or "unknown", "versions": versions, "device": device_name(world)}


def provenance(program: str, arguments: Sequence[str], measured: Sequence[dict[str, str]] = ()) -> str:
    """A markdown table of the command and of `facts`: those kept with the measurements, or else of this process."""
    measured = measured or [facts()]
    rows = {"command": f"`{shlex.join(['python', program, *arguments])}`"}
    rows |= {name: "; ".join(dict.fromkeys(each[name] for each in measured)) for name in measured[0]}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
