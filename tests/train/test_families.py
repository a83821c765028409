"""Every family on digits, from its own recipe: the loss falls, and a run cut in two is the run in one piece."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from promoe_ds.checkpoint import layout
from tests.launch import run, torchrun

WORKER, STEPS, HALF = "tests/distributed/train_worker.py", 12, 6
FAMILIES = ("", "dense", "tc", "ec", "diffmoe", "promoe_ec", "kmeans", "classification", "ddpm")
TERMS = {"tc": "load_balance", "diffmoe": "capacity", "classification": "superclass", "ddpm": "vb"}
SMALL = (
    "model.depth=2", "model.width=64", "train.global_batch_size=64", "optimizer.lr=5e-3", "sample.steps=1",
    "train.log_every=1", "parallel.expert_parallel=1",
)  # fmt: skip


def recipe_of(family: str) -> str:
    """ProMoE, the default, is plain `digits`."""
    return f"digits_{family}".rstrip("_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs in one launch."""
    folder, work = tmp_path_factory.mktemp("families"), []
    for recipe in map(recipe_of, FAMILIES):
        for kind, every, steps in (("whole", STEPS, STEPS), ("halves", HALF, HALF), ("halves", HALF, STEPS)):
            overrides = (*SMALL, f"train.steps={steps}", f"train.checkpoint_every={every}")
            work.append((f"{recipe} {kind}", f"zero0 {recipe}", *overrides))
    run(torchrun(1, WORKER, str(folder), json.dumps(work)))
    return folder


def read(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_resumes(folder: Path, family: str) -> None:
    recipe = recipe_of(family)
    whole, halves = read(folder / f"{recipe} whole"), read(folder / f"{recipe} halves")
    losses = [key for key in whole[0] if key.startswith("loss")]
    assert f"loss/{TERMS.get(family, 'diffusion')}" in losses
    assert all(math.isfinite(record[key]) for record in whole for key in losses)
    first, last = (sum(record["loss/diffusion"] for record in part) for part in (whole[:4], whole[-4:]))
    assert last < 0.9 * first
    for record, again in zip(whole, halves, strict=True):
        assert [record[key] for key in ("step", *losses)] == [again[key] for key in ("step", *losses)]
    runs = (folder / f"{recipe} {kind}" for kind in ("whole", "halves"))
    ema, again = (load_file(layout.folder(path, STEPS) / layout.EMA) for path in runs)
    assert ema.keys() == again.keys() and all(torch.equal(ema[name], again[name]) for name in ema)
