"""Processes that make micro-batches, each every n-th of them, and hand their arrays over through shared memory.

Threads of one process share its interpreter lock, also with the thread that launches the model's kernels;
benchmarks/results/encode_in_step.md has figures. The workers are forked, so they share the index of the data with their
parent. They end with it at once: its peers notice its death by the sockets that it had open, and so have its children.

Not torch's DataLoader, whose workers hear SIGTERM again, which schedulers send to every process of a job although the
ranks are to save first; and whose tensors come from /dev/shm, of which Docker gives 64 MB.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import numpy as np
import torch

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.utils.signals import STOP_SIGNALS

PLACES = 2
"""results of a worker that wait for the parent at most"""
ALIGNED = 64
"""bytes, of arrays in shared memory"""
JOIN_SECONDS = 1.0

Arrays = dict[str, np.ndarray]


class Workers(Iterator[Arrays]):
    """`make(first)`, `make(first + 1)`, ... in turn, each made by one of several processes.

    What is returned lies in memory that is written again after the next call. An exception of `make` is raised here,
    and the process goes on with its next number.

    Args:
        make: pure; must not touch a GPU.
        nbytes: of all arrays of a result, the same for every one.
        count: how many processes.

    Raises:
        ConfigError: a process was killed.
    """

    def __init__(self, make: Callable[[int], Arrays], first: int, nbytes: int, count: int):
        fork = multiprocessing.get_context("fork")
        place = nbytes + 16 * ALIGNED
        self._pipes: list[Connection] = []
        self._places: list[list[memoryview]] = []
        self._processes: list[BaseProcess] = []
        for worker in range(count):
            # No name in a file system, so it is freed with the processes, and /dev/shm does not bound it.
            places = [memoryview(mmap.mmap(-1, place)) for _ in range(PLACES)]
            ours, theirs = fork.Pipe()
            arguments = make, itertools.count(first + worker, count), theirs, places, [*self._pipes, ours]
            process = fork.Process(target=_work, args=arguments, name=f"worker {worker}", daemon=True)
            process.start()
            theirs.close()
            for _ in range(PLACES):
                ours.send(None)
            self._pipes.append(ours)
            self._places.append(places)
            self._processes.append(process)
        self._taken: Connection | None = None
        self._numbers = itertools.count()
        # Before multiprocessing itself ends and waits for processes at exit, by a signal that these ignore.
        self._finalizer = util.Finalize(self, _end, (self._processes,), exitpriority=10)

    def __next__(self) -> Arrays:
        turn, worker = divmod(next(self._numbers), len(self._pipes))
        pipe, place = self._pipes[worker], self._places[worker][turn % PLACES]
        if self._taken is not None:  # the place of the last result may be written again
            with contextlib.suppress(OSError):  # it was killed, which is told when its turn comes
                self._taken.send(None)
        self._taken = pipe
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            self._died(self._processes[worker])
        if isinstance(answer, BaseException):
            raise answer
        pickled, spans = answer
        return pickle.loads(pickled, buffers=[place[start:end] for start, end in spans])

    def _died(self, process: BaseProcess) -> NoReturn:
        process.join(JOIN_SECONDS)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        conflict = f"a process that decodes pictures {how}: too little memory, most likely"
        reject("data.workers", len(self._pipes), conflict, "set a lower number, or 0 for threads")

    def end(self) -> None:
        """End the processes, whatever they are at; a `next` under way raises. Harmless when repeated."""
        self._finalizer()


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(JOIN_SECONDS)


def _work(
    make: Callable[[int], Arrays],
    numbers: Iterable[int],
    pipe: Connection,
    places: list[memoryview],
    parents: list[Connection],
) -> None:
    """Body of a process. `parents` are the parent's ends of pipes, which would never say that it is gone."""
    for number in STOP_SIGNALS:  # meant for the parent, which saves first
        signal.signal(number, signal.SIG_IGN)
    for theirs in parents:
        theirs.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed its end
        for turn, number in enumerate(numbers):
            pipe.recv()
            pipe.send(_tried(make, number, places[turn % PLACES]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _tried(make: Callable[[int], Arrays], number: int, place: memoryview) -> Any:
    """The result without its arrays' bytes, which are now in `place`, and where there; or what was raised."""
    try:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(make(number), protocol=5, buffer_callback=buffers.append)
        spans, start = [], 0
        for buffer in buffers:
            raw = buffer.raw()
            place[start : start + raw.nbytes] = raw
            spans.append((start, start + raw.nbytes))
            start += -(-raw.nbytes // ALIGNED) * ALIGNED
        return pickled, spans
    except ConfigError as error:
        return error
    except Exception as error:  # with its traceback, which does not travel
        traceback.print_exc()
        return RuntimeError(f"{type(error).__name__} in a worker: {error}")
