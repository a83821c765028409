"""Start real jobs from tests: one process, torchrun, or the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import free_port, run_to_end

ROOT = Path(__file__).resolve().parent.parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
"""the C++ compiler that torch.compile calls on a CPU, if there is one"""
ENVIRONMENT = {
    **os.environ,
    **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    "PYTHONUNBUFFERED": "1",  # output is a job's sign of life
}


def torchrun(processes: int, script: str | Path, *args: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*command, "--", str(ROOT / script), *args]


def deepspeed(processes: int, script: str | Path, *args: str) -> list[str]:
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, f"--num_gpus={processes}", f"--master_port={free_port()}", str(ROOT / script), *args]


def run(
    command: list[str], check: bool = True, env: dict[str, str] = ENVIRONMENT, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check`, a failure shows the end of both outputs."""
    done = run_to_end(command, env, cwd)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def train(*args: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """launchers/train.py, alone or under torchrun."""
    if processes > 1:
        return run(torchrun(processes, "launchers/train.py", *args), check)
    return run([sys.executable, str(ROOT / "launchers/train.py"), *args], check)
