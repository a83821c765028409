"""Scores while training, by real processes: those of the launchers, resumable, and never the end of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.checkpoint import layout
from promoe_ds.sampling.job import INCIDENTAL
from tests.launch import ENVIRONMENT, ROOT, run, train

GUIDED = ("sample.cfg=1.5", "guidance.interval=[100,900]", "sample.seed=3")
SCORED = ("--config", "tiny", "train.score_every=3", "train.score_images=130", "train.checkpoint_every=3", *GUIDED)
TWO = ("--ds_config", str(ROOT / "ds_configs/zero2.json"), "parallel.expert_parallel=2")
"""the EMA is sharded, and so are the experts"""


def records(folder: Path) -> list[dict[str, Any]]:
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def scores(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record["scores"] for record in records(folder) if "scores" in record}


def numbers(score: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in score.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    done = train(*SCORED, *TWO, "--run", str(folder), "train.steps=6", processes=2)
    assert "scores of 130 images at step 6: label_agreement 0." in done.stdout
    return folder


def test_they_are_those_of_the_launchers(scored: Path) -> None:
    """Of one process, which draws the same batches, and reads them back from PNGs."""
    program = [sys.executable, str(ROOT / "launchers/sample.py")]
    run([*program, "--run", str(scored), "--num", "130", "--steps", "4", "--seed", "3"])
    run([sys.executable, str(ROOT / "launchers/evaluate.py"), "--run", str(scored)])
    (theirs,) = json.loads((scored / "metrics.json").read_text())["sets"]
    ours = scores(scored)[6]
    assert ours.keys() == theirs.keys() and ours["samples_sha256"] == theirs["samples_sha256"]
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6)
    where = ("checkpoint", "checkpoint_blake2b", *INCIDENTAL)
    assert ours["sampling"] == {key: value for key, value in theirs["sampling"].items() if key not in where} | {
        key: ours["sampling"][key] for key in INCIDENTAL
    }
    assert ours["sampling"]["forwards_per_image"] == theirs["sampling"]["forwards_per_image"] == 7


def test_a_resumed_run_scores_at_the_same_steps_and_changes_nothing_else(scored: Path, tmp_path: Path) -> None:
    """Also at the step of the checkpoint, if the run ended before its score."""
    again = ("--run", str(tmp_path / "run"))
    train(*SCORED, *TWO, *again, "train.steps=3", "train.score_every=0", processes=2)
    assert scores(tmp_path / "run") == {}
    train(*SCORED, *TWO, *again, "train.steps=6", processes=2)
    assert scores(tmp_path / "run") == scores(scored)
    losses = [{r["step"]: r["loss"] for r in records(folder) if "loss" in r} for folder in (scored, tmp_path / "run")]
    assert losses[0] == losses[1] and list(losses[0]) == [1, 2, 3, 4, 5, 6]


class Choosy(nn.Module):
    """Takes any number of images but two, which is what the second of two ranks is left with of 130."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] != 2, "two are too few"
        return x.flatten(1)[:, :3]


def test_a_rank_that_cannot_score_stops_no_run(tmp_path: Path) -> None:
    network, statistics = tmp_path / "net.pt", tmp_path / "reference.npz"
    torch.jit.script(Choosy()).save(str(network))  # type: ignore[no-untyped-call]
    np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3))
    more = (f"train.score_ref={statistics}", f"train.score_features={network}")
    folder = tmp_path / "run"
    done = train(*SCORED, *TWO, *more, "--run", str(folder), "train.steps=4", processes=2)
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: no scores")]
    assert warning.startswith("warning: no scores at step 3: rank 1: ConfigError: --features=")
    assert "fails on images [2, 8, 8, 1]" in warning and warning.endswith("training goes on")
    assert scores(folder) == {} and [r["step"] for r in records(folder)] == [1, 2, 3, 4]


def test_a_signal_interrupts_a_score_which_the_next_start_makes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = ("--run", str(folder), "--config", "tiny", "train.score_every=2", "train.steps=2")
    command = [sys.executable, str(ROOT / "launchers/train.py"), *long, "train.score_images=500000"]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    saved = lambda: layout.candidates(folder) if (folder / "checkpoints").is_dir() else []  # noqa: E731
    wait_until(lambda: saved() or process.poll() is not None, lambda: len(records(folder)))
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 85 and "stopped by a signal at step 2" in out and scores(folder) == {}
    train(*long, "train.score_images=70")
    assert scores(folder)[2]["num"] == 70 and [r["step"] for r in records(folder)] == [1, 2, 2]
