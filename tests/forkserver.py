"""Start jobs by forking a process that has imported torch and DeepSpeed: each process then starts seconds sooner.

A forked rank is a process like any other (its own session, environment, output, exit code; ranks talk over gloo), but
no launcher stands over it, and its imports are done. Tests of launchers, signals and imports start real commands.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "deepspeed", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.figure",
             "diffusers"]  # fmt: skip
"""nearly all that a small job takes is importing these"""
REQUEST = 1 << 20
"""bytes; the longest command line and environment"""


class Forked:
    """A job of the server; of `subprocess.Popen` it has what `run_to_end` needs."""

    def __init__(self, answers: socket.socket):
        self.answers, self.returncode = answers, None
        self.pid = int(self.answers.recv(64))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The first exit code that is not 0, of all ranks; -N for the signal N."""
        if self.returncode is None:
            self.returncode = int(self.answers.recv(64) or -signal.SIGKILL)
            self.answers.close()
        return self.returncode


class ForkServer:
    """One for each environment, since libraries read some of it as they are imported."""

    def __init__(self, env: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory()
        self.address = str(Path(self.folder.name) / "socket")
        command = [sys.executable, __file__, self.address]
        self.server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == b"ready\n", "the fork server does not start"

    def start(self, argv: list[str], processes: int, env: dict[str, str], cwd: Path, out: Any, err: Any) -> Forked:
        """Run a Python script in `processes` ranks."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.address)
        request = {"argv": argv, "processes": processes, "env": env, "cwd": str(cwd)}
        socket.send_fds(server, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
        return Forked(server)


def serve(address: str) -> None:
    """Answer requests until the tests end; returns in the processes that are to run a script."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the jobs' first processes
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:  # closed: the tests are over
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return job(connection)
        connection.close()


def job(connection: socket.socket) -> None:
    """Fork the ranks, wait for them, and tell; returns in the ranks."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    text, descriptors, _, _ = socket.recv_fds(connection, REQUEST, 2)
    request = json.loads(text)
    connection.send(str(os.getpid()).encode().ljust(64))
    for rank in range(request["processes"]):
        if os.fork() == 0:
            connection.close()
            return become(rank, request, descriptors)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(request["processes"])]
    connection.send(str(next((code for code in codes if code), 0)).encode().ljust(64))
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


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    serve(sys.argv[1])
    runpy.run_path(sys.argv[0], run_name="__main__")
