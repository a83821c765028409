"""The paper's tables on small data: what a table says is what was trained, and a mistake costs nothing."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import struct
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import paper_tables, scoring
from benchmarks.fashion import pack, read_idx
from benchmarks.paper_report import Row, accuracies, expected, orderings, over_seeds, sign_test
from benchmarks.paper_tables import TABLES, parse_args, plan, run
from promoe_ds.data import build_dataset
from promoe_ds.recipes.load import load_config
from promoe_ds.utils import signals
from promoe_ds.utils.command_line import STOPPED, guarded

SMALL = ["model.depth=2", "model.width=32", "model.heads=2", "sample.steps=3", "train.global_batch_size=16"]


@pytest.fixture(autouse=True)
def few_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "OBSERVED", 50)


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


@pytest.mark.slow
def test_a_table_is_trained_scored_and_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper_tables, "TURNS", 2)
    command = args_of(tmp_path, "--table", "12", "--steps", "20", "--num", "20", "--seeds", "0,1")
    assert guarded(run, [*command, "--minutes", "0"]) == STOPPED
    assert guarded(run, command) == 0
    page = (tmp_path / "out/paper_table12_digits.md").read_text()
    assert "| without (ProMoE) |" in page
    assert any(f"as in the paper in {n} of 1 pairs" in page for n in (0, 1))
    assert (tmp_path / "out/paper_table12_digits.png").stat().st_size > 5000
    runs = sorted((tmp_path / "runs/digits").glob("*/seed*"))
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert len(runs) == 4 and len({log[-1]["loss/diffusion"] for log in logs}) == 4
    kept = json.loads((tmp_path / "out/paper_tables_digits.json").read_text())
    for run_folder, log in zip(runs, logs, strict=True):
        late = [record["load_max_over_mean"] for record in log if record["step"] in range(16, 21)]  # the last quarter
        scores = kept[f"{run_folder.parent.name}/{run_folder.name}"]
        assert len(late) == 5 and scores["load_max_over_mean"] == pytest.approx(sum(late) / 5)
    assert {scores["sampler_steps"] for scores in kept.values()} == {3}  # as told below
    experts = next(scores["experts"] for name, scores in kept.items() if name.startswith("promoe-20"))
    assert 0 <= experts["class"] <= 1 and "position" in experts
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    assert guarded(run, command) == 0
    assert "step" not in capsys.readouterr().out.split("#")[0]  # nothing is trained or scored again


@pytest.mark.slow
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
    command = args_of(tmp_path, "--table", "12", "--data", "cifar10", "--path", str(tmp_path / "pack.npz"))
    assert guarded(run, [*command, "--steps", "2", "--num", "20", "--judge-steps", "2"]) == 0
    assert "label-cnn" in (tmp_path / "out/paper_table12_cifar10.md").read_text()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Two files as Debian's dataset-fashion-mnist has them."""
    for name, array in ((f"{split}-images-idx3-ubyte.gz", images), (f"{split}-labels-idx1-ubyte.gz", labels)):
        head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        (folder / name).write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    folder, draw = tmp_path / "idx", np.random.default_rng(0)
    folder.mkdir()
    for split, num in (("train", 40), ("t10k", 20)):
        images = draw.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        write_idx(folder, split, images, np.arange(num, dtype=np.uint8) % 10)
    return folder


def test_fashion_is_read_to_the_last_pixel(idx_folder, tmp_path):
    pack(idx_folder, tmp_path / "fashion.npz")
    options = ["data.name=images", f"data.path={tmp_path / 'fashion.npz'}", "model.image_size=28", "data.split=test"]
    data = build_dataset(load_config("digits", options))
    x_NCHW, label_N = data.get(np.arange(20))
    pixels_NHW = read_idx(idx_folder / "t10k-images-idx3-ubyte.gz", 3)
    assert torch.equal(((x_NCHW[:, 0] + 1) * 127.5).round(), torch.from_numpy(pixels_NHW.astype(np.float32)))
    assert label_N.tolist() == [*range(10), *range(10)] and data.classes[9] == "ankle boot"


@pytest.mark.slow
def test_fashion_rows_share_a_judge_and_are_kept(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "TURNS", 1)
    command = args_of(tmp_path, "--table", "8", "--data", "fashion", "--path", str(idx_folder), "--steps", "2")
    command += ["--num", "20", "--judge-steps", "2"]
    assert guarded(run, [*command, "--minutes", "0"]) == STOPPED
    with (
        paper_tables.alone(tmp_path / "runs/fashion/a") as first,
        paper_tables.alone(tmp_path / "runs/fashion/a") as second,
    ):
        assert first and not second
    assert guarded(run, command) == 0
    judge = tmp_path / "runs/fashion/judge_2.safetensors"
    kept = json.loads((tmp_path / "out/paper_tables_fashion.json").read_text())
    accuracy = {scores["judge_accuracy"] for scores in kept.values()}
    assert len(kept) == 4 and len(accuracy) == 1
    written = judge.read_bytes()
    assert guarded(run, [*command, "--seeds", "1"]) == 0  # another seed, judged by the same weights
    kept = json.loads((tmp_path / "out/paper_tables_fashion.json").read_text())
    assert judge.read_bytes() == written and len(kept) == 8
    assert {scores["judge_accuracy"] for scores in kept.values()} == accuracy


def test_a_signal_ends_the_study_and_loses_nothing(tmp_path, monkeypatch):
    command = args_of(tmp_path, "--table", "12", "--steps", "4", "--num", "20")
    monkeypatch.setattr(signals, "_request", signal.SIGTERM)
    assert guarded(run, command) == STOPPED
    assert not list((tmp_path / "runs").rglob("step_*"))
    args, (_, runs) = parse_args(command), plan(parse_args(command), "12")
    assert paper_tables.train_until(runs[0].config, runs[0].folder, 2) == STOPPED  # met before the first step
    monkeypatch.setattr(signals, "_request", None)
    assert paper_tables.train_until(runs[0].config, runs[0].folder, 2) == 0
    study = paper_tables.Study(args, runs)
    assert [each.turns() for each in runs] == [2, 0] and study.left()[0] is runs[1]  # the one furthest behind


def test_a_page_names_each_judge():
    runs = [{"judge_accuracy": 0.9243, "seed": 0}, {"judge_accuracy": 0.9233, "seed": 1}]
    assert accuracies(runs[:1] * 2) == "0.924"
    assert accuracies([*runs, {"judge_accuracy": 0.9233, "seed": 2}]) == "0.924 (seed 0) and 0.923 (seed 1, 2)"


def test_a_cell_has_the_mean_over_seeds_and_half_their_range():
    assert over_seeds([1.0, 4.0, 2.5], 2) == "2.50 ± 1.50" and over_seeds([1.0], 1) == "1.0"
    assert over_seeds([None, None], 2) == "-"


def test_signs_and_expected_orders():
    assert sign_test(3, 3) == 0.125 and sign_test(2, 3) == 0.5 and sign_test(0, 3) == 1
    config = load_config("digits")
    a, b, c = (
        Row(name, (name,), config, paper)
        for name, paper in (("a", {1.5: [2.0, 9.0]}), ("b", {1.5: [3.0, 8.0]}), ("c", {}))
    )
    assert expected(a, b, 1.5) == expected(b, a, 1.5) == (a, b, True)
    assert expected(a, c, 1.5) == (c, a, False) and expected(a, b, 1.0) == (b, a, False)
    fd = {"fd": 2.0, "is": 1.0, "agreement": 1.0}
    scores = {"cfg1.0": fd, "cfg1.5": fd}
    kept = {"a": {"ema_loss": 0.25, **scores}, "b": {"ema_loss": 0.5, **scores}}
    text = orderings([a, b], kept)
    assert "| a | b | yes | 1/1 (p 0.5, +0.25) | 0/1 (p 1, +0) | 0/1 (p 1, +0) |" in text
    assert "- EMA loss: the mean over seeds stands as in the paper in 1 of 1 pairs" in text


@pytest.mark.parametrize("flaw", ["missing", "not gzip", "images for labels", "cut", "counts"])
def test_bad_idx_files_are_told_in_a_line(flaw, idx_folder, tmp_path, capsys):
    file = idx_folder / "train-labels-idx1-ubyte.gz"
    if flaw == "missing":
        file.unlink()
    elif flaw == "not gzip":
        file.write_bytes(b"labels")
    elif flaw == "images for labels":
        file.write_bytes((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())
    elif flaw == "cut":
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    else:
        write_idx(idx_folder, "train", np.zeros((40, 28, 28), np.uint8), np.zeros(39, np.uint8))
    command = ["--table", "8", "--data", "fashion", "--path", str(idx_folder), "--runs", str(tmp_path / "runs")]
    assert guarded(run, [*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    known = {
        "missing": "cannot be read",
        "not gzip": "cannot be read",
        "counts": "has 40 images and 39 labels of train",
    }
    assert known.get(flaw, "is no IDX of bytes in 1 dimension(s)") in error and error.count("\n") == 1
    assert not (tmp_path / "runs/fashion/fashion.npz").exists()


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
