"""No command writes among the checkpoints of a run, and none over what it did not make."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.digits import digits_images
from promoe_ds.utils.outputs import check_new, check_place, check_run_place
from tests.sample_folder import write_run


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A checkpoint of a run, with samples beside them."""
    file = write_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("name: tiny\n")
    images, labels = digits_images()
    np.savez(tmp_path / "samples.npz", arr_0=images[:20], arr_1=labels[:20])
    return file.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], launcher: object, *words: object) -> str:
    """What a launcher says, which is one line; everything it might write stays as it is."""
    assert importlib.import_module(f"launchers.{launcher}").main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


def test_a_place_among_checkpoints_is_known_by_name_and_by_link(step: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for place in (run / "checkpoints", step, step / "deep" / "er", run / "samples" / ".." / "checkpoints"):
        with pytest.raises(ConfigError, match=f"--out=.*: would write among the checkpoints of {run}; name a place"):
            check_place(place)
    (tmp_path / "link").symlink_to(step)
    with pytest.raises(ConfigError, match=f"--run={tmp_path}/link/x: would write among the checkpoints of {run}"):
        check_place(tmp_path / "link" / "x", "--run")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="would write among the checkpoints"):
        check_place(run / "checkpoints" / "new")


def test_other_places_are_free(step: Path, tmp_path: Path) -> None:
    check_place(tmp_path / "run" / "samples")
    check_place(tmp_path / "run" / "metrics.json")
    check_place(tmp_path / "checkpoints" / "of_nobody")
    (tmp_path / "config.yaml").write_text("somebody's\n")
    check_place(tmp_path / "checkpoints" / "run")  # of whoever keeps runs there
    check_new(tmp_path / "run" / "new")
    with pytest.raises(ConfigError, match=r"exists; nothing is overwritten; name another one"):
        check_new(tmp_path / "run" / "config.yaml")


def test_a_run_lies_in_no_other_run(step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run / "samples")
    for place in (run / "samples", run / "new" / "er", run / "samples" / ".." / "more", tmp_path / "link" / "x"):
        with pytest.raises(ConfigError, match=f"--run=.*: lies in the run {run}; name another folder"):
            check_run_place(place)
        assert f"lies in the run {run}" in refusal(capsys, "train", "--config", "tiny", "--run", place)
        assert f"lies in the run {run}" in refusal(capsys, "pipeline", "tiny", "--run", place)
    for place in (run, tmp_path / "run" / ".", tmp_path / "other", tmp_path / "other" / ".." / "new"):
        check_run_place(place)
    with pytest.raises(ConfigError, match=f"--run={tmp_path}: holds the run {run}; name a folder of its own"):
        check_run_place(tmp_path)
    shutil.copytree(run, run / "samples" / "begun")  # before this was refused
    check_run_place(run / "samples" / "begun")
    shutil.rmtree(run / "samples")
    (run / "checkpoints").rename(tmp_path / "lost")
    (run / "saved").touch()
    with pytest.raises(ConfigError, match=f"lies in the run {run}; name another folder"):
        check_run_place(run / "inner")
    (tmp_path / "lost").rename(run / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    run.rename(tmp_path / "elsewhere" / "run")
    run.symlink_to(tmp_path / "elsewhere" / "run")
    check_run_place(run)


def test_every_command_keeps_out_of_checkpoints_and_files(
    step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, samples = tmp_path / "run", tmp_path / "samples.npz"
    (tmp_path / "file").touch()
    inside, before = tmp_path / "file/a/b", contents(tmp_path)
    for place in (run / "checkpoints", step, step / "new", inside):
        conflict = (
            f"{tmp_path}/file is not a folder" if place == inside else f"would write among the checkpoints of {run}"
        )
        for words in (
            ("sample", "--run", run, "--num", 2, "--steps", 2, "--out", place),
            ("analyze", "--run", run, "--out", place, "--dry-run"),
            ("encode_latents", "--images", tmp_path, "--vae", "identity", "--out", place),
            ("export", "--run", run, "--out", place),
            ("import_weights", step / "ema.safetensors", "--out", place),
            ("checkpoint", "convert", "--run", run, "--weights", "ema", "--out", place),
            ("train", "--config", "tiny", "--run", place),
            ("train", "--config", "tiny", "--run", place, "--dry-run", "--check-files"),
        ):
            assert conflict in refusal(capsys, *words), words
    for words in (
        ("evaluate", samples, "--out", step / "scores.json"),
        ("evaluate", "ref", "digits", "--out", run / "checkpoints" / "a.safetensors"),
        ("inspect_data", tmp_path, "--sheet", step / "sheet.png"),
    ):
        assert f"would write among the checkpoints of {run}" in refusal(capsys, *words), words
    assert contents(tmp_path) == before


def test_features_and_references_overwrite_nothing(
    step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of a file is a slip of the hand away from weights."""
    samples, kept = tmp_path / "samples.npz", tmp_path / "kept.safetensors"
    kept.write_bytes((step / "ema.safetensors").read_bytes())
    before = contents(tmp_path)
    for words in (("ref", "digits"), ("features", samples)):
        text = refusal(capsys, "evaluate", *words, "--features", "digits-cnn", "--out", kept)
        assert f"--out={kept}: exists; nothing is overwritten; name another file, or remove this one" in text
    assert contents(tmp_path) == before


def test_scores_replace_scores_alone(step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "manifest.json"
    for text in ('{"step": 7}', '{"sets": 3}', "[1]", "not JSON", "[" * 100_000):
        out.write_text(text)
        line = refusal(capsys, "evaluate", tmp_path / "samples.npz", "--out", out)
        assert f"--out={out}: exists; nothing is overwritten; name another file, or remove this one" in line
        assert out.read_text() == text
    out.write_text(json.dumps({"num": 3, "sets": [{"num": 3}]}))
    assert importlib.import_module("launchers.evaluate").main([str(tmp_path / "samples.npz"), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["num"] == 20
