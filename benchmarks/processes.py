"""Start jobs and wait for them. Waits end after silence, not because work takes long: machines differ tenfold."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 600.0
"""seconds without a sign of life after which a job counts as hung"""


def wait_until(true: Callable[[], T], sign: Callable[[], object] = lambda: None, what: Callable[[], object] = str) -> T:
    """Poll until `true()` is, and return what it gave.

    Args:
        sign: changes as long as work goes on, such as the length of an output.
        what: gives the text of the error.

    Raises:
        AssertionError: after PATIENCE seconds in which `sign()` did not change.
    """
    last, since = sign(), time.monotonic()
    while not (found := true()):
        polled = time.monotonic()
        if (now := sign()) != last:
            last, since = now, polled
        assert polled - since < PATIENCE, f"{PATIENCE:.0f} s without a sign of life: {what()}"
        time.sleep(max(0.01, 3 * (time.monotonic() - polled)))  # asking must not slow down what is asked for
    return found


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]
