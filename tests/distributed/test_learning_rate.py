"""Another learning rate on resume, through the real trainer on two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from promoe_ds.checkpoint import layout
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
