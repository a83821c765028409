"""The profile of some steps: written for what was asked, also when a run ends within it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from promoe_ds.train.profiling import StepProfiler
from tests.launch import train


def test_a_run_ends_within_the_steps(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler("2:9", tmp_path, torch.device("cpu"), said.append)
    for step in (1, 2, 3):
        profiler.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.after(step)
    profiler.close(3)
    profiler.close(3)
    assert said == [f"  profile of steps 2 to 3: {tmp_path / 'profile'}"]
    assert "aten::mm" in (tmp_path / "profile/top_steps_2_to_3.txt").read_text()


def test_training_writes_trace_and_table(tmp_path: Path) -> None:
    done = train("--config", "tiny", "--run", str(tmp_path), "train.steps=4", "train.profile=2:3",
                 "train.checkpoint_every=4")  # fmt: skip
    assert f"profile of steps 2 to 3: {tmp_path / 'profile'}" in done.stdout
    table = (tmp_path / "profile/top_steps_2_to_3.txt").read_text()
    assert "grouped_mm" in table
    with gzip.open(tmp_path / "profile/trace_steps_2_to_3.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]
