"""Start real jobs from tests: one process, torchrun, or the deepspeed launcher."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port, run_to_end
from tests.forkserver import Forked, ForkServer

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
CXX = shutil.which(os.environ.get("CXX", "g++"))
"""the C++ compiler that torch.compile calls on a CPU, if there is one"""
ENVIRONMENT = {
    **os.environ,
    **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    "PYTHONUNBUFFERED": "1",  # output is a job's sign of life
}


def torchrun(processes: int, script: str | Path, *args: str) -> list[str]:
    return [sys.executable, *TORCHRUN, f"--nproc-per-node={processes}", "--", str(ROOT / script), *args]


def deepspeed(processes: int, script: str | Path, *args: str) -> list[str]:
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, f"--num_gpus={processes}", f"--master_port={free_port()}", str(ROOT / script), *args]


def run(
    command: list[str], check: bool = True, env: dict[str, str] = ENVIRONMENT, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check`, a failure shows the end of both outputs.

    A script that is expected to succeed is forked from a process that has its imports (`tests/forkserver.py`).
    """
    done = run_to_end(command, env, cwd, start_forked if check and forkable(command, env) else subprocess.Popen)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def forkable(command: list[str], env: dict[str, str]) -> bool:
    """Whether it is a script, alone or under torchrun, that needs no other libraries than we import."""
    same = {key: value for key, value in env.items() if key in ENVIRONMENT} == ENVIRONMENT
    return same and command[0] == sys.executable and (command[1].endswith(".py") or command[1:4] == TORCHRUN)


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer(ENVIRONMENT)


def start_forked(command: list[str], env: dict[str, str], cwd: Path, stdout: Any, stderr: Any, **_: Any) -> Forked:
    processes, argv = 1, command[1:]
    if "--" in command[:6]:
        processes, argv = int(command[4].removeprefix("--nproc-per-node=")), command[6:]
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return fork_server().start(argv, processes, env, cwd, stdout, stderr)


def train(*args: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """launchers/train.py, alone or under torchrun."""
    if processes > 1:
        return run(torchrun(processes, "launchers/train.py", *args), check)
    return run([sys.executable, str(ROOT / "launchers/train.py"), *args], check)
