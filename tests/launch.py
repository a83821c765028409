"""Start real jobs from tests: one process, torchrun, or the deepspeed launcher."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port, wait_until
from tests.forkserver import Forked, ForkedRank, ForkServer

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


def run_to_end(
    command: list[str],
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    start: Callable[..., Any] = subprocess.Popen,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, whatever the exit code; a job that falls silent is killed with all its processes.

    Args:
        start: makes a job of the command, in a session of its own.

    Raises:
        AssertionError: the job was silent for PATIENCE seconds; shows the end of its outputs.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = start(command, stdout=out, stderr=err, env=env, cwd=cwd, start_new_session=True)
        written = lambda: [os.fstat(file.fileno()).st_size for file in (out, err)]  # noqa: E731
        read = lambda file: file.seek(0) or file.read()  # noqa: E731
        try:
            outputs = lambda: f"{command}\n{read(out)[-4000:]}\n{read(err)[-6000:]}"  # noqa: E731
            wait_until(lambda: job.poll() is not None, written, outputs)
        finally:
            if job.poll() is None:
                kill(job)
        return subprocess.CompletedProcess(command, job.returncode, read(out), read(err))


def kill(job: subprocess.Popen[Any]) -> None:
    """kill -9 of a job that was started in a session of its own, launcher and ranks alike."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def run(
    command: list[str],
    check: bool = True,
    env: dict[str, str] = ENVIRONMENT,
    cwd: Path = ROOT,
    fork: bool | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check`, a failure shows the end of both outputs.

    A script that is expected to succeed is forked from a process that has its imports (`tests/forkserver.py`).

    Args:
        fork: whether it is; for a script whose failure does not depend on how it was started.
    """
    fork = forkable(command, env) and (check if fork is None else fork)
    done = run_to_end(command, env, cwd, start_forked if fork else subprocess.Popen)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def forkable(command: list[str], env: dict[str, str]) -> bool:
    """Whether it is a script, alone or under torchrun, that needs no other libraries than we import."""
    same = {key: value for key, value in env.items() if key in ENVIRONMENT} == ENVIRONMENT
    script = command[1].endswith(".py") or (command[1:4] == TORCHRUN and command[5] == "--")
    return same and command[0] == sys.executable and script


@functools.cache
def fork_server() -> ForkServer:
    """One for all processes of a test run."""
    run, alone = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.getpid()
    folder = Path(tempfile.gettempdir()) / f"promoe_ds_tests_{run or alone}"
    return ForkServer(ENVIRONMENT, folder, os.getppid() if run else alone)


def start_forked(command: list[str], env: dict[str, str], cwd: Path, stdout: Any, stderr: Any, **_: Any) -> Forked:
    processes, argv = 1, command[1:]
    if command[1] == "-m":
        processes, argv = int(command[4].removeprefix("--nproc-per-node=")), command[6:]
        env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return fork_server().start(argv, processes, env, cwd, stdout, stderr)


def run_forked(command: list[str], stdout: Any, stderr: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a script under torchrun, for benchmarks that start jobs; both outputs go to the same file."""
    job = start_forked(command, ENVIRONMENT, ROOT, stdout, stdout)
    return subprocess.CompletedProcess(command, job.wait())


def start_child(command: list[str]) -> Forked:
    """`subprocess.Popen(command)` of a script: it writes where this process does."""
    with open(1, "wb", closefd=False) as out, open(2, "wb", closefd=False) as err:
        return start_forked(command, dict(os.environ), ROOT, out, err)


def start_rank(command: list[str], env: dict[str, str], stdout: Any, cwd: Path = ROOT, **_: Any) -> Forked:
    """`subprocess.Popen` of `PYTHON -u SCRIPT ...`, one rank, as `chaos.Job` calls it: errors go where output goes."""
    return fork_server().start(command[2:], 1, env, cwd, stdout, stdout, ForkedRank)


def train(
    *args: str, processes: int = 1, check: bool = True, fork: bool | None = None
) -> subprocess.CompletedProcess[str]:
    """launchers/train.py, alone or under torchrun."""
    alone = [sys.executable, str(ROOT / "launchers/train.py"), *args]
    return run(torchrun(processes, "launchers/train.py", *args) if processes > 1 else alone, check, fork=fork)
