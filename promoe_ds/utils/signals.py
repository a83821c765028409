"""Requests to stop (Ctrl-C, SIGTERM ...): heard from the first moment of a process, obeyed after a step.

Imports nothing heavy, so that a launcher can call `listen` before it imports torch: a scheduler's warning that comes
while libraries load would otherwise kill the rank. A thread reads the signals' numbers from a pipe, because handlers in
Python wait for the main thread, which may be inside a collective that never ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from promoe_ds.utils.files import write_text

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C, preemption, Slurm's warning before the time limit (NCCL has used SIGUSR1), and a terminal that is gone"""
REPEAT_SECONDS = 5.0
"""launchers pass on what their process group also got, as SIGTERM: a repeat within this time is the same request"""
CTRL_C_SECONDS = 0.5
"""the same for Ctrl-C, which nobody passes on as SIGINT but `timeout -s INT`, at the same moment"""
INTERRUPTED = 128 + signal.SIGINT
"""exit code after Ctrl-C: a loop that starts again what ended with 85 must not start what a person has stopped"""
MARKER = "requeue"

_request: signal.Signals | None = None


def requested() -> str | None:
    """The name of the signal that asked this process to stop; None if none did."""
    return _request.name if _request else None


def listen() -> None:
    """Take `STOP_SIGNALS` as requests to stop from now on; a second request ends the process at once.

    Where SIGHUP is ignored already, as under `nohup`, it stays so. Children do not hear of requests to their group, and
    `terminate` does nothing to them: data workers end with their parent, and must not take it down; a C++ compiler that
    is killed leaves an empty library in the compiler's cache, on which every later start fails.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    terminals = [number for number in (1, 2) if os.isatty(number)]
    threading.Thread(target=_hear, args=(read_end, _leave, terminals), name="signals", daemon=True).start()
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # a handler in Python makes the interpreter write to the pipe
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # of this thread, and of programs that it starts
    os.register_at_fork(after_in_child=_ignore)
    atexit.register(_ignore)  # a late repeat would kill a process that has saved: Python puts handlers back at its end


def _ignore() -> None:
    signal.set_wakeup_fd(-1)  # the pipe is the parent's
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _hear(read_end: int, leave: Callable[[signal.Signals], None], terminals: Sequence[int]) -> None:
    """Body of the thread: the first signal is a request, a later one calls `leave`."""
    global _request
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    first = 0.0
    while data := os.read(read_end, 1):
        if data[0] not in STOP_SIGNALS:
            continue  # another handler's
        now, number = time.monotonic(), signal.Signals(data[0])
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:  # a line printed there is an error now, before anything is saved
                os.dup2(nowhere, terminal)
        if _request is None:
            first, _request = now, number
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                print("Ctrl-C: stopping once this step is saved; again to leave at once", file=sys.stderr, flush=True)
        elif number == signal.SIGINT != _request and now - first < CTRL_C_SECONDS:
            _request = number  # its copy by a launcher came first: of two that wait, the kernel serves the later one
        elif now - first > (CTRL_C_SECONDS if number == signal.SIGINT else REPEAT_SECONDS):
            leave(number)


def _leave(number: signal.Signals) -> None:
    print(f"{number.name} again: leaving at once; the last checkpoint is unharmed", file=sys.stderr, flush=True)
    os._exit(128 + number)


def write_marker(run: Path, step: int) -> None:
    """Leave RUN/requeue, which tells a batch script that the same command continues; the checkpoint must be whole."""
    text = f"stopped by {requested() or 'a signal to another rank'} at step {step}\n"
    write_text(run / MARKER, text, durable=True)


def remove_marker(run: Path) -> None:
    (run / MARKER).unlink(missing_ok=True)
