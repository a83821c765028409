from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks.processes import wait_until
from promoe_ds.config.errors import ConfigError
from promoe_ds.data.workers import Arrays, Workers
from tests.launch import ENVIRONMENT, ROOT

NBYTES = 8 * 3 + 4 * 1000


def make(number: int) -> Arrays:
    return {"number": np.array([number, os.getpid(), 0]), "noise": np.random.default_rng(number).random(1000, "f4")}


@contextmanager
def working(make: Callable[[int], Arrays], count: int, first: int = 0) -> Iterator[Workers]:
    workers = Workers(make, first, NBYTES, count)
    try:
        yield workers
    finally:
        workers.end()


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_turn_and_from_every_process(count: int) -> None:
    with working(make, count, first=7) as workers:
        pids = set()
        for number, made in zip(range(7, 27), workers, strict=False):
            assert made["number"][0] == number and np.array_equal(made["noise"], make(number)["noise"])
            pids.add(int(made["number"][1]))
    assert len(pids) == count and os.getpid() not in pids and not any(map(alive, pids))


def test_a_process_does_not_run_ahead_without_end_nor_write_what_is_being_read() -> None:
    with working(make, 1) as workers:
        first = next(workers)
        time.sleep(0.3)  # time for thousands, were it not bounded
        assert first["number"][0] == 0
        assert [int(next(workers)["number"][0]) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_an_error_of_one_result_is_raised_in_its_turn(capfd: pytest.CaptureFixture[str]) -> None:
    def faulty(number: int) -> Arrays:
        if number == 2:
            raise ConfigError("data.path=x: is damaged; replace it")
        if number == 3:
            raise KeyError("oops")
        return make(number)

    with working(faulty, 2) as workers:
        assert [int(next(workers)["number"][0]) for _ in range(2)] == [0, 1]
        with pytest.raises(ConfigError, match="^data.path=x: is damaged; replace it$"):
            next(workers)
        with pytest.raises(RuntimeError, match="KeyError in a worker: 'oops'"):
            next(workers)
        assert next(workers)["number"][0] == 4
    assert "in faulty" in capfd.readouterr().err  # the traceback


def test_a_result_larger_than_said_is_an_error() -> None:
    with (
        working(lambda number: {"x": np.zeros(100_000)}, 1) as workers,
        pytest.raises(RuntimeError, match="ValueError"),
    ):
        next(workers)


def test_a_process_that_is_killed_is_told_in_one_line() -> None:
    with working(make, 2) as workers:
        pid = int(next(workers)["number"][1])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConfigError) as caught:
            for _ in range(10):
                next(workers)
    assert str(caught.value) == (
        "data.workers=2: a process that decodes pictures was killed by SIGKILL: too little memory, most likely; "
        "set a lower number, or 0 for threads"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_whole_job_is_for_the_ranks(number: signal.Signals) -> None:
    """Schedulers send SIGTERM to every process, and ranks then finish a step and save."""
    with working(make, 1) as workers:
        os.kill(int(next(workers)["number"][1]), number)
        assert [int(next(workers)["number"][0]) for _ in range(6)] == [1, 2, 3, 4, 5, 6]


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from promoe_ds.data.workers import Workers
from tests.data.test_workers import NBYTES, make
import time
workers = Workers({make}, 0, NBYTES, 3)
print(*(p.pid for p in workers._processes), flush=True)
{then}
"""


def start(then: str, make: str = "make") -> tuple[subprocess.Popen[str], list[int]]:
    script = SCRIPT.format(root=str(ROOT), make=make, then=then)
    job = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    return job, list(map(int, job.stdout.readline().split()))


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed() -> None:
    """Whatever they are at: its peers would take its sockets, which they hold too, for a rank that lives."""
    job, pids = start("time.sleep(1000)", "lambda number: time.sleep(1000)")
    assert len(pids) == 3 and all(map(alive, pids))
    job.kill()
    job.wait()
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.slow
def test_a_process_that_forgot_to_end_them_still_exits() -> None:
    job, pids = start("next(workers)")
    wait_until(lambda: job.poll() is not None)
    assert job.returncode == 0
    wait_until(lambda: not any(map(alive, pids)))


def test_numbers_are_shared_out_from_any_first() -> None:
    with working(make, 3, first=10) as workers:
        assert [int(made["number"][0]) for made in itertools.islice(workers, 7)] == list(range(10, 17))
