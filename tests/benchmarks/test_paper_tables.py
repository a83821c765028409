"""The paper's tables on small data: what a table says is what was trained, and a mistake costs nothing."""

from __future__ import annotations

import io
import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import paper_tables, scoring
from benchmarks.paper_tables import TABLES, parse_args, plan, run
from promoe_ds.utils.command_line import STOPPED, guarded

SMALL = ["model.depth=2", "model.width=32", "model.heads=2", "sample.steps=3", "train.global_batch_size=16"]


def args_of(tmp_path: Path, *options: str) -> list[str]:
    return [*options, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *SMALL]


@pytest.mark.parametrize("data", TABLES["data"])
@pytest.mark.parametrize("table", TABLES["tables"])
def test_every_row_of_every_table_is_a_valid_and_different_config(table, data, tmp_path):
    path = [] if data == "digits" else ["--path", "x.npz"]
    rows, runs = plan(parse_args(["--table", table, "--data", data, *path, "--seeds", "0,1"]), table)
    assert len(rows) == len(TABLES["tables"][table]["rows"]) and len(runs) == 2 * len(rows)
    for a, b in combinations(runs, 2):
        assert a.config != b.config and a.folder != b.folder and a.key != b.key


def test_a_table_is_trained_scored_and_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper_tables, "TURNS", 2)
    monkeypatch.setattr(scoring, "OBSERVED", 50)
    command = args_of(tmp_path, "--table", "8", "--steps", "20", "--num", "20", "--seeds", "0,1")
    assert guarded(run, [*command, "--minutes", "0"]) == STOPPED
    assert guarded(run, command) == 0
    page = (tmp_path / "out/paper_table8_digits.md").read_text()
    assert (
        "| K-Means with conditional routing |" in page and "as in the paper in 0 of 1 pairs" in page or "1 of 1" in page
    )
    assert (tmp_path / "out/paper_table8_digits.png").stat().st_size > 5000
    runs = sorted((tmp_path / "runs/digits").glob("*/seed*"))
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss/diffusion"] for run in runs]
    assert len(runs) == 8 and len(set(losses)) == 8
    kept = json.loads((tmp_path / "out/paper_tables_digits.json").read_text())
    assert {scores["sampler_steps"] for scores in kept.values()} == {3}  # as told below
    experts = next(scores["experts"] for name, scores in kept.items() if name.startswith("classification-20"))
    assert 0 <= experts["class"] <= 1 and "position" in experts
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    assert guarded(run, command) == 0
    assert "step" not in capsys.readouterr().out.split("#")[0]  # nothing is trained or scored again


def test_cifar_rows_are_judged_by_a_classifier_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "TURNS", 1)
    draw, arrays = np.random.default_rng(0), {"classes": np.array([f"c{i}" for i in range(10)])}
    for split, num in (("train", 40), ("test", 20)):
        files = []
        for _ in range(num):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            files.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(num) % 10
    np.savez(tmp_path / "pack.npz", **arrays)
    command = args_of(tmp_path, "--table", "8", "--data", "cifar10", "--path", str(tmp_path / "pack.npz"))
    assert guarded(run, [*command, "--steps", "2", "--num", "20", "--judge-steps", "2"]) == 0
    assert "label-cnn" in (tmp_path / "out/paper_table8_cifar10.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "99"], "--table=99: is not known; choose one of 1, 3, 4"),
        (["--table", "5", "--data", "mnist"], "--data=mnist: is not known; choose one of digits, cifar10, fashion"),
        (["--table", "5", "--data", "cifar10"], "--path=null: --data cifar10 needs one; add --path FILE.npz"),
        (["--table", "5", "train.lr=1"], "train.lr=1: unknown key"),
    ],
)
def test_mistakes(options, message, tmp_path, capsys):
    assert guarded(run, [*options, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
