"""Signals and deaths in real jobs whose ranks have no launcher above them, as under plain srun."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from benchmarks import chaos
from promoe_ds.train import checkpoint
from tests.launch import ROOT

COMMON = ["--config", "tiny", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "parallel.expert_parallel=2"]
LONG = ["train.steps=1000", "train.checkpoint_every=1000"]


def stopped(arguments: list[str], outputs: Path, number: signal.Signals, victims: list[int], step: int) -> chaos.Job:
    """Start two ranks, signal some when `step` is logged (0: as soon as they listen), wait for the end."""
    with chaos.job(arguments, 2, outputs) as job:
        job.wait_until(job.listening if step == 0 else lambda: job.step() >= step)
        job.send(number, victims)
        job.wait()
    return job


def test_signals_lose_no_step(tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "run" / "requeue"
    arguments = [*COMMON, *LONG, "--run", str(run)]
    first = stopped(arguments, tmp_path / "1", signal.SIGUSR2, [1], 3)
    assert first.codes() == [85, 85], first.output()
    assert marker.read_text() == f"stopped by a signal to another rank at step {first.step()}\n"
    (saved,) = checkpoint.candidates(run)
    assert checkpoint.damage(saved) is None and checkpoint.step_of(saved) == first.step()

    second = stopped(arguments, tmp_path / "2", signal.SIGTERM, [0, 1], first.step() + 3)
    assert second.codes() == [85, 85], second.output()
    assert second.resumed_at() == first.step() < second.step()
    assert marker.read_text() == f"stopped by SIGTERM at step {second.step()}\n"

    third = stopped([*arguments, "--exit-zero-on-signal"], tmp_path / "3", signal.SIGUSR2, [0, 1], 0)
    assert third.codes() == [0, 0] and third.step() == 0, third.output()
    assert marker.read_text() == f"stopped by SIGUSR2 at step {second.step()}\n"
    assert checkpoint.step_of(checkpoint.candidates(run)[-1]) == second.step()

    end = second.step() + 2
    with chaos.job([*COMMON, "--run", str(run), f"train.steps={end}"], 2, tmp_path / "4") as job:
        assert job.wait() == [0, 0], job.output()
    assert not marker.exists() and [step for step, _ in chaos.log(run)] == list(range(1, end + 1))


def test_a_second_signal_ends_a_rank_that_waits_for_another(tmp_path: Path) -> None:
    """Rank 1 stands still, so rank 2 is in a collective that does not end; the end of rank 2 ends rank 0."""
    arguments = ["--config", "tiny", *LONG, "train.global_batch_size=33", "--run", str(tmp_path / "run")]
    with chaos.job(arguments, 3, tmp_path / "out") as job:
        job.wait_until(lambda: job.step() >= 2)
        job.send(signal.SIGSTOP, [1])
        job.send(signal.SIGTERM, [2])
        time.sleep(5.5)
        assert job.codes() == [None] * 3
        job.send(signal.SIGTERM, [2])
        assert job.ranks[2].wait(60) == 128 + signal.SIGTERM
        assert job.ranks[0].wait(60) == 1
        assert f"error: rank 2 ({os.uname().nodename}, pid {job.ranks[2].pid}) died without a word" in job.output()
        assert "SIGTERM again: leaving at once" in job.output()


def test_a_run_folder_in_use_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """Only rank 0 sees the lock; the others must not wait for it."""
    lock = checkpoint.claim(tmp_path / "run")
    start = time.monotonic()
    with chaos.job([*COMMON, *LONG, "--run", str(tmp_path / "run")], 2, tmp_path / "out") as job:
        assert job.wait() == [2, 2], job.output()
    lock.close()
    errors = re.findall(r"^error: .*", job.output(), re.MULTILINE)
    assert len(errors) == 1 and "another process is training in it" in errors[0]
    assert time.monotonic() - start < 90 and not (tmp_path / "run/config.yaml").exists()


def test_an_error_of_one_rank_ends_the_others_by_name(tmp_path: Path) -> None:
    arguments = [*COMMON, *LONG, "--run", str(tmp_path / "run")]
    with chaos.job(arguments, 2, tmp_path / "out", "tests/distributed/faulty_train.py") as job:
        assert job.wait() == [1, 1], job.output()
    errors = re.findall(r"^error: .*", job.output(), re.MULTILINE)
    assert errors == ["error: rank 1 failed: ZeroDivisionError: a fault of the test"]
    assert job.output().count("Traceback") == 1, "rank 0, which waited for rank 1, has nothing to add"


def test_chaos(tmp_path: Path) -> None:
    """Four kills; benchmarks/results/chaos.md has twenty."""
    run = chaos.Chaos(kills=4, seed=5211, folder=tmp_path, max_world=2)
    assert [str(strike.blow) for strike in run.strikes] == [
        *("SIGKILL to one rank during a save", "SIGKILL to one rank"),
        *("SIGUSR2 to one rank", "SIGUSR2 to all ranks while starting"),
    ]
    run.measure()
    assert not run.faults()
    assert [s.connected and len(s.told) for s in run.strikes[:2]] == [1, 1], "the dead rank was named, and that counted"
