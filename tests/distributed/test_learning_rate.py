"""Learning rates through the real trainer: another one on resume, and a schedule that goes on at another topology."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from promoe_ds.checkpoint import layout
from promoe_ds.config.schedule import learning_rate
from promoe_ds.recipes.load import load_config
from tests.launch import run, torchrun

OTHER = "optimizer.lr=0.003"


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = layout.folder(folder, step).glob("state-*.safetensors")
    return {key: x for file in files for key, x in load_file(file).items() if key.endswith("/fp32")}


def rates(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["lr"]) for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_another_learning_rate_on_resume(tmp_path: Path) -> None:
    """It moves the weights of the next step, at every kind of ZeRO; the run folder knows from which step on.

    No grid can be drawn in the last folder, where a file lies in the way of `samples`: its time is not told.
    """
    often, work = ("train.log_every=100", "train.checkpoint_every=1", "train.keep_last=9"), []
    for stage in (0, 2, 3):
        work.append((f"first{stage}", f"zero{stage}", "train.steps=4", "train.checkpoint_every=4"))
        for name in ("same", "other"):
            target = layout.folder(tmp_path / f"{name}{stage}", 4)
            target.parent.mkdir(parents=True)
            os.symlink(layout.folder(tmp_path / f"first{stage}", 4), target)
            work.append((target.parents[1].name, f"zero{stage}", *often, "train.steps=6", *[OTHER] * (name == "other")))
    work.append(("other2", "zero2", *often, "train.steps=7", OTHER))
    work.append(("other2", "zero2", *often, "train.steps=9"))
    (tmp_path / "other2" / "samples").write_text("in the way")
    done = run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))

    for stage in (0, 2, 3):
        before, same, other = (weights(tmp_path / f, s) for f, s in (
            (f"first{stage}", 4), (f"same{stage}", 5), (f"other{stage}", 5)))  # fmt: skip
        for key, start in before.items():
            torch.testing.assert_close(other[key] - start, 3 * (same[key] - start), rtol=1e-3, atol=1e-6)
        assert any((same[key] - start).abs().max() > 1e-4 for key, start in before.items())
        assert rates(tmp_path / f"same{stage}") == [(6, 0.001)]
    for stage in (0, 3):
        assert rates(tmp_path / f"other{stage}") == [(5, 0.003), (6, 0.003)]
    assert rates(tmp_path / "other2") == [(5, 0.003), (6, 0.003), (7, 0.003), (8, 0.001), (9, 0.001)]
    assert done.stdout.count("resuming at step 4 of 6, optimizer.lr 0.003 instead of 0.001; ") == 3
    assert done.stdout.count("resuming at step 6 of 7; ") == 1
    assert done.stdout.count("resuming at step 7 of 9, optimizer.lr 0.001 instead of 0.003; ") == 1
    assert layout.manifest(layout.folder(tmp_path / "other2", 9))["config"]["optimizer"]["lr"] == 0.001
    assert done.stdout.count("  no sample grid: ") == 3 and done.stdout.count("  sample grid: ") == len(work) - 3


SCHEDULE = ("optimizer.schedule=cosine", "optimizer.warmup_steps=3", "optimizer.schedule_steps=10",
            "optimizer.lr_floor=0.1")  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_a_schedule_goes_on_at_another_topology(tmp_path: Path) -> None:
    """Stopped at the top of a cosine, and on at other world sizes, ep and ZeRO stages, past the schedule's end.

    What is logged are the rates of the pure function. Rates that were counted from the resume on would change the loss
    of the next step by 1e-3 and more. That the rate of a step is the one that is logged: the test below.
    """
    often = ("train.log_every=1", "train.checkpoint_every=5", *SCHEDULE)
    first = [("whole", "zero2", "train.steps=12", *often), ("first", "zero2", "train.steps=5", *often)]
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(first)))
    after = {"alone": (1, 1, 0), "two": (2, 1, 1), "four": (4, 4, 3)}
    for name, (world, ep, stage) in after.items():
        target = layout.folder(tmp_path / name, 5)
        target.parent.mkdir(parents=True)
        os.symlink(layout.folder(tmp_path / "first", 5), target)
        work = [(name, f"zero{stage}", "train.steps=12", f"parallel.expert_parallel={ep}", *often)]
        run(torchrun(world, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
        whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / name)
        assert list(resumed) == list(range(6, 13))
        assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-5)
        assert rates(tmp_path / name) == rates(tmp_path / "whole")[5:]
    config = load_config("tiny", ["train.steps=12", *SCHEDULE])
    assert rates(tmp_path / "whole") == [(step, learning_rate(config, step)) for step in range(1, 13)]
    assert len({rate for _, rate in rates(tmp_path / "whole")}) == 10  # step 3 and 4 are at the peak, 11 and 12 at 0.1


def test_the_rate_of_a_step_is_the_one_that_is_logged(tmp_path: Path) -> None:
    """A cosine falls to 0 within the run, and a step moves weights if and only if its record says so: the rate of the
    step before would move those of step 4, that of the step after would not move those of step 3."""
    often = ("train.checkpoint_every=1", "train.keep_last=9", "parallel.expert_parallel=1")
    ending = ("optimizer.schedule=cosine", "optimizer.schedule_steps=3", "optimizer.lr_floor=0")
    work = [("run", "zero1", "train.steps=5", *often, *ending)]
    run(torchrun(1, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
    kept = [weights(tmp_path / "run", step) for step in range(1, 6)]
    moved = [any(not torch.equal(x, after[key]) for key, x in before.items()) for before, after in pairwise(kept)]
    assert moved == [rate > 0 for _, rate in rates(tmp_path / "run")][1:] == [True, True, False, False]
