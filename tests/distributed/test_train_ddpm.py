"""DDPM through the real trainer: its log, and the same losses on one process and on two that share the experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT, run, torchrun, train

DDPM = ("model.learn_sigma=true", "diffusion.name=ddpm")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ddpm_losses_do_not_depend_on_the_topology(tmp_path: Path) -> None:
    ds = str(ROOT / "ds_configs/zero0.json")
    done = train("--config", "tiny", "--ds_config", ds, "--run", str(tmp_path / "one"), *DDPM, "train.steps=20")
    assert "  vb 0." in done.stdout
    two = [("two", "zero2", "train.steps=20", "train.checkpoint_every=20", *DDPM)]
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(two)))
    one, two_ranks = records(tmp_path / "one"), records(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two_ranks] == list(range(1, 21))
    for ours, theirs in zip(one, two_ranks, strict=True):
        for key in ("loss", "loss/diffusion", "loss/vb", "loss/routing_contrastive", "grad_norm"):
            tolerance = 1e-4 if key == "grad_norm" else 1e-5
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours["step"], key)
        total = ours["loss/diffusion"] + ours["loss/vb"] + ours["loss/routing_contrastive"]
        assert ours["loss"] == pytest.approx(total, rel=1e-6)
    assert one[-1]["loss/diffusion"] < one[0]["loss/diffusion"]
    assert (tmp_path / "one/samples/grid.png").is_file()
