"""Command, commit, versions and device: the head of every page under results/."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def device_name() -> str:
    """The first GPU, or the CPU cores this process may use and torch's threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{cores} virtual {platform.machine()} CPU cores, {threads} thread(s), shared machine"


def facts() -> dict[str, str]:
    """Commit, versions and device of this process; `commit` ends in + where the tree differs from it."""
    import deepspeed
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    return {"commit": commit or "unknown", "versions": versions, "device": device_name()}


def provenance(program: str, arguments: Sequence[str], measured: Sequence[dict[str, str]] = ()) -> str:
    """A markdown table of the command and of `facts`: those kept with the measurements, or else of this process."""
    measured = measured or [facts()]
    rows = {"command": f"`{shlex.join(['python', program, *arguments])}`"}
    rows |= {name: "; ".join(dict.fromkeys(each[name] for each in measured)) for name in measured[0]}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
