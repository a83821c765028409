"""Start real jobs from tests: one process, torchrun, or the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
"""the C++ compiler that torch.compile calls on a CPU, if there is one"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, script: str | Path, *args: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*command, "--", str(ROOT / script), *args]


def deepspeed(processes: int, script: str | Path, *args: str) -> list[str]:
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, f"--num_gpus={processes}", f"--master_port={free_port()}", str(ROOT / script), *args]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(command: list[str], timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check`, a failure shows the end of both outputs."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=ROOT)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def train(*args: str, processes: int = 1, timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess[str]:
    """launchers/train.py, alone or under torchrun."""
    if processes > 1:
        return run(torchrun(processes, "launchers/train.py", *args), timeout, check)
    return run([sys.executable, str(ROOT / "launchers/train.py"), *args], timeout, check)
