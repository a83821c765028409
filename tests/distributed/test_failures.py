"""Signals and deaths in real jobs whose ranks have no launcher above them, as under plain srun."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import chaos
from benchmarks.common import read_log
from benchmarks.processes import PATIENCE
from promoe_ds.checkpoint import layout
from tests.launch import ROOT, start_rank

COMMON = ["--config", "tiny", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "parallel.expert_parallel=2"]
LONG = ["train.steps=1000", "train.checkpoint_every=1000"]


def start(arguments: list[str], world: int, outputs: Path, script: str = "launchers/train.py") -> chaos.Job:
    """Ranks that have their imports."""
    return chaos.Job(arguments, world, outputs, script, start_rank)


def stopped(arguments: list[str], outputs: Path, number: signal.Signals, victims: list[int], step: int) -> chaos.Job:
    """Start two ranks, signal some when `step` is logged (0: as soon as they listen, so they import for themselves),
    wait for the end."""
    with start(arguments, 2, outputs) if step else chaos.Job(arguments, 2, outputs) as job:
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
    (saved,) = layout.candidates(run)
    assert layout.damage(saved) is None and layout.step_of(saved) == first.step()

    second = stopped(arguments, tmp_path / "2", signal.SIGINT, [0, 1], first.step() + 3)
    assert second.codes() == [130, 130], second.output()
    assert second.resumed_at() == first.step() < second.step()
    assert marker.read_text() == f"stopped by SIGINT at step {second.step()}\n"
    assert second.output().count("Ctrl-C: stopping once this step is saved") == 1 and "Traceback" not in second.output()

    third = stopped([*arguments, "--exit-zero-on-signal"], tmp_path / "3", signal.SIGUSR2, [0, 1], 0)
    assert third.codes() == [0, 0] and third.step() == 0, third.output()
    assert marker.read_text() == f"stopped by SIGUSR2 at step {second.step()}\n"
    assert layout.step_of(layout.candidates(run)[-1]) == second.step()

    end = second.step() + 2
    with start([*COMMON, "--run", str(run), f"train.steps={end}"], 2, tmp_path / "4") as job:
        assert job.wait() == [0, 0], job.output()
    assert not marker.exists() and [r["step"] for r in read_log(run)] == list(range(1, end + 1))


def test_a_second_signal_ends_a_rank_that_waits_for_another(tmp_path: Path) -> None:
    """Rank 1 stands still, so rank 2 is in a collective that does not end; the end of rank 2 ends rank 0."""
    arguments = ["--config", "tiny", *LONG, "train.global_batch_size=33", "--run", str(tmp_path / "run")]
    with start(arguments, 3, tmp_path / "out") as job:
        job.wait_until(lambda: job.step() >= 2)
        job.send(signal.SIGSTOP, [1])
        job.send(signal.SIGTERM, [2])
        time.sleep(5.5)
        assert job.codes() == [None] * 3
        job.send(signal.SIGTERM, [2])
        assert job.ranks[2].wait(PATIENCE) == 128 + signal.SIGTERM
        assert job.ranks[0].wait(PATIENCE) == 1
        assert f"error: rank 2 ({os.uname().nodename}, pid {job.ranks[2].pid}) died without a word" in job.output()
        assert "SIGTERM again: leaving at once" in job.output()


def test_a_run_folder_in_use_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """Only rank 0 sees the lock; the others must not wait for it, which would take `parallel.timeout_minutes`, 30."""
    lock = layout.claim(tmp_path / "run")
    with start([*COMMON, *LONG, "--run", str(tmp_path / "run")], 2, tmp_path / "out") as job:
        assert job.wait() == [2, 2], job.output()
    lock.close()
    errors = re.findall(r"^error: .*", job.output(), re.MULTILINE)
    assert len(errors) == 1 and "another process is training in it" in errors[0]
    assert not (tmp_path / "run/config.yaml").exists()


def test_an_error_of_one_rank_ends_the_others_by_name(tmp_path: Path) -> None:
    arguments = [*COMMON, *LONG, "--run", str(tmp_path / "run")]
    with start(arguments, 2, tmp_path / "out", "tests/distributed/faulty_train.py") as job:
        assert job.wait() == [1, 1], job.output()
    errors = re.findall(r"^error: .*", job.output(), re.MULTILINE)
    assert errors == ["error: rank 1 failed: ZeroDivisionError: a fault of the test"]
    assert job.output().count("Traceback") == 1, "rank 0, which waited for rank 1, has nothing to add"


def test_chaos(tmp_path: Path) -> None:
    """Four kills; benchmarks/results/chaos.md has twenty."""
    run = chaos.Chaos(kills=4, seed=5211, folder=tmp_path, max_world=2, popen=start_rank)
    assert [str(strike.blow) for strike in run.strikes] == [
        *("SIGKILL to one rank during a save", "SIGKILL to one rank"),
        *("SIGUSR2 to one rank", "SIGUSR2 to all ranks while starting"),
    ]
    run.measure()
    assert not run.faults()
    assert [s.connected and len(s.told) for s in run.strikes[:2]] == [1, 1], "the dead rank was named, and that counted"


KILLED = {"codes": [1, -9], "connected": True, "told": ["rank 1 (node, pid 5) died without a word (killed)"]}
WRONG = [  # blow, what came of it, the fault
    ((signal.SIGKILL, False, "step"), {"codes": [0, -9]}, "as if nothing had happened"),
    ((signal.SIGKILL, False, "step"), {"told": []}, "not one message that names rank 1"),
    ((signal.SIGKILL, False, "step"), {"told": KILLED["told"] * 2}, "not one message"),
    ((signal.SIGKILL, False, "step"), {"told": ["rank 0 died without a word"]}, "not one message"),
    ((signal.SIGKILL, False, "step"), {"repeated": -1}, "-1 steps repeated"),
    ((signal.SIGKILL, False, "step"), {"repeated": 11}, "11 steps repeated"),
    ((signal.SIGKILL, False, "step"), {"marker": True, "start": 5}, "a marker after kill -9"),
    ((signal.SIGKILL, False, "save"), {}, "the blow missed the save"),
    ((signal.SIGTERM, False, "step"), {"codes": [85, 85]}, "not every rank ended with 85"),
    ((signal.SIGTERM, False, "step"), {"codes": [85, 1], "marker": True}, "not every rank ended with 85"),
    ((signal.SIGTERM, False, "step"), {"codes": [85, 85], "marker": True, "repeated": 1}, "not every rank"),
]


def test_chaos_finds_what_was_promised_and_did_not_hold() -> None:
    for how, changed, fault in WRONG:
        found = list(chaos.Strike(chaos.Blow(*how), (2, 1, 0), [1], 1, 0.0, **(KILLED | changed)).faults())
        assert len(found) == 1 and fault in found[0], (how, changed, found)
    kill = chaos.Blow(signal.SIGKILL, False, "start")
    assert not list(chaos.Strike(kill, (2, 1, 0), [1], 1, 0.0, **KILLED).faults())
    assert not list(chaos.Strike(kill, (2, 1, 0), [1], 1, 0.0, codes=[1, -9]).faults()), (
        "not connected: no name is known"
    )


def test_chaos_compares_logs_and_weights(tmp_path: Path) -> None:
    run = chaos.Chaos(kills=1, seed=0, folder=tmp_path, max_world=1)
    for name, steps, weight in (("calm", [1, 2, 3, 4], 1.0), ("run", [1, 3, 3], 1.001)):
        folder = layout.folder(tmp_path / name, run.steps)
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor([0.0, weight])}, folder / layout.EMA)
        (tmp_path / name / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {weight}}}\n' for s in steps))
    run.compare()
    run.strikes[0].codes, run.strikes[0].half_written = [-9], True
    assert run.lost == 2 and run.disordered and abs(run.ema_deviation - 1e-3) < 1e-6
    assert run.faults() == [
        *("a loss deviates by inf", "an EMA weight deviates by 1.0e-03", "2 steps are lost, steps are logged twice")
    ]
