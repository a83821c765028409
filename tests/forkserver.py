"""Start jobs by forking a process that has imported torch, DeepSpeed and ours: each process then starts seconds sooner.

A forked rank is a process like any other (its own session, environment, output, exit code; ranks talk over gloo), but
no launcher stands over it, and its imports are done. Tests of launchers and imports start real commands.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

MODULES = [
    *("torch", "deepspeed", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.figure"),
    *("diffusers.models.autoencoders.autoencoder_kl", "promoe_ds.train.trainer", "promoe_ds.evaluation.evaluate"),
]
"""nearly all that a small job takes is importing these"""
REQUEST = 1 << 20
"""bytes; the longest command line and environment"""
ANSWER = 256


class Forked:
    """A job of the server; of `subprocess.Popen` it has what `run_to_end` needs."""

    def __init__(self, answers: socket.socket):
        self.answers, self.returncode = answers, None
        self.pid, *self.ranks = map(int, self.answers.recv(ANSWER).split())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The first exit code that is not 0, of all ranks; -N for the signal N."""
        if self.returncode is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked job", timeout or 0.0)
            self.returncode = int(self.answers.recv(ANSWER) or -signal.SIGKILL)
            self.answers.close()
        return self.returncode


class ForkedRank(Forked):
    """The only rank of a job; has what `chaos.Job` asks of `subprocess.Popen`."""

    def __init__(self, answers: socket.socket):
        super().__init__(answers)
        (self.pid,) = self.ranks

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """One for each environment, since libraries read some of it as they are imported.

    Args:
        env: of the server.
        folder: who names the same one shares the server; whoever comes first starts it.
        owner: the process with which it ends.
    """

    def __init__(self, env: dict[str, str], folder: Path, owner: int):
        folder.mkdir(mode=0o700, exist_ok=True)
        self.address = str(folder / "socket")
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(self.address):
                command = [sys.executable, __file__, self.address, str(owner)]
                server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                          start_new_session=True)  # fmt: skip
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n", "the fork server does not start"

    def start(
        self,
        argv: list[str],
        processes: int,
        env: dict[str, str],
        cwd: Path,
        out: Any,
        err: Any,
        kind: type[Forked] = Forked,
    ) -> Forked:
        """Run a Python script in `processes` ranks."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.address)
        request = {"argv": argv, "processes": processes, "env": env, "cwd": str(cwd)}
        socket.send_fds(server, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        return kind(server)


def serve(address: str, owner: int) -> None:
    """Answer requests until the tests end; returns in the processes that are to run a script."""
    end = os.pidfd_open(owner)
    gc.freeze()  # else every job looks through all that was imported, and so copies it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the jobs' first processes
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, end], [], [])
        if end in ready:
            shutil.rmtree(Path(address).parent, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(end)
            return job(connection)
        connection.close()


def job(connection: socket.socket) -> None:
    """Fork the ranks, wait for them, and tell; returns in the ranks."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    text, descriptors, _, _ = socket.recv_fds(connection, REQUEST, 2)
    request = json.loads(text)
    pids = [os.getpid()]
    for rank in range(request["processes"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            connection.close()
            return become(rank, request, descriptors)
    connection.send(" ".join(map(str, pids)).encode().ljust(ANSWER))
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(request["processes"])]
    connection.send(str(next((code for code in codes if code), 0)).encode().ljust(ANSWER))
    os._exit(0)


def become(rank: int, request: dict[str, Any], descriptors: list[int]) -> None:
    """Take on what a new process has of its own."""
    os.environ.clear()
    os.environ.update(request["env"])
    if request["processes"] > 1:
        world = str(request["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)


def run(script: str) -> NoReturn:
    """End as Python does after a script, but for taking apart all that was imported: a third of a second of copying."""
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except Exception:  # told as Python tells it, and the exit code is its
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    serve(sys.argv[1], int(sys.argv[2]))
    run(sys.argv[0])
