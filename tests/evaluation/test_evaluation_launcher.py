from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from torch import Tensor, nn

from launchers.evaluate import main
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.collect import load_features, save_features
from promoe_ds.evaluation.digits import digits_images
from promoe_ds.evaluation.evaluate import Evaluator
from promoe_ds.evaluation.report import format_table, notes
from tests.evaluation.random_inception import pictures
from tests.launch import run

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "evaluate.py"


def save(folder: Path, n: int, cfg: float) -> Path:
    images, labels = digits_images()
    folder.mkdir(parents=True)
    np.savez(folder / "samples.npz", arr_0=images[:n], arr_1=labels[:n])
    (folder / "sampling.json").write_text(json.dumps({"cfg": cfg, "seed": 7}), encoding="utf-8")
    return folder / "samples.npz"


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


def test_run_folder_from_elsewhere(tmp_path: Path):
    folder = tmp_path / "run"
    save(folder / "samples" / "cfg4.0", 200, 4.0)
    save(folder / "samples" / "cfg1.0", 300, 1.0)
    done = run([sys.executable, str(LAUNCHER), "--run", "run"], cwd=tmp_path)
    assert done.stdout.startswith("digits-cnn: accuracy on held-out real images 0.9")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["cfg"] == 1.0 and metrics["num"] == 300 and metrics["sampling"]["seed"] == 7
    assert [s["cfg"] for s in metrics["sets"]] == [1.0, 4.0]
    assert metrics["label_agreement"] >= 0.97 and metrics["fd_over_noise"] < 0.1


def test_unfinished_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    save(run / "samples" / "cfg1.0", 20, 1.0)
    for scale in ("2.0", "3.0"):
        (save(run / "samples" / f"cfg{scale}", 20, 2.0)).unlink()
    assert main(["--run", str(run), "--dry-run"]) == 0
    folders = f"{run}/samples/cfg2.0, {run}/samples/cfg3.0"
    text = f"note: not finished, and left out: {folders}; launchers/sample.py finishes them\n"
    assert capsys.readouterr().err == text


def test_mistake_in_a_process_has_no_traceback(tmp_path: Path):
    done = subprocess.run([sys.executable, str(LAUNCHER), "absent.npz"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: SAMPLES=absent.npz: no such file; draw samples first: launchers/sample.py, or name an existing .npz\n"
    )


def test_sample_sets_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = save(tmp_path / "a", 100, 1.0), save(tmp_path / "b", 150, 2.0)
    out = tmp_path / "m.json"
    assert main([str(one), str(two.parent), "--ref", "digits", "--features", "digits-cnn", "--out", str(out)]) == 0
    assert [s["num"] for s in json.loads(out.read_text())["sets"]] == [100, 150]
    assert str(out) in capsys.readouterr().out


def test_errors_leave_the_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, out = save(tmp_path / "a", 10, 1.0), tmp_path / "metrics.json"
    out.write_text(before := '{"sets": []}')
    bad = tmp_path / "bad.npz"
    bad.write_bytes(good.read_bytes()[:200])
    assert "no readable .npz" in failure(capsys, good, bad, "--out", out)
    assert "choose one of digits-cnn" in failure(capsys, good, "--features", "resnet", "--out", out)
    assert "choose one of digits" in failure(capsys, good, "--ref", "mnist", "--out", out)
    np.savez(bad, arr_0=np.zeros((3, 9, 9, 1), np.uint8), arr_1=np.zeros(3, np.int64))
    assert "digits-cnn takes [8, 8, 1]" in failure(capsys, good, bad, "--out", out)
    assert "ends in .json" in failure(capsys, good, "--out", good)
    assert out.read_text() == before


def test_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "nothing to score" in failure(capsys)
    assert "unrecognized arguments: --frobnicate" in failure(capsys, "a.npz", "--frobnicate")
    assert "give one or the other" in failure(capsys, "a.npz", "--run", tmp_path)
    assert "no such folder" in failure(capsys, "--run", tmp_path / "absent")
    assert "no finished samples below" in failure(capsys, "--run", tmp_path)


def test_help_ends_with_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


class MeanColour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_references_and_features_on_a_network_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    network, ref, features = tmp_path / "mean.pt", tmp_path / "ref.safetensors", tmp_path / "a.safetensors"
    torch.jit.save(torch.jit.script(MeanColour()), network)
    for i, image in enumerate(pictures(7, 1)):
        (tmp_path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / str(i % 2) / f"{i}.png")
    np.savez(tmp_path / "a.npz", arr_0=pictures(6, 2, (16, 16)))
    own = ["--features", str(network), "--device", "cpu", "--batch", "4"]
    photos = ["ref", str(tmp_path / "photos"), "--size", "16", *own]
    assert main([*photos, "--keep", "5", "--out", str(ref)]) == 0
    assert "7 images, 5 rows of features of mean:" in capsys.readouterr().out
    assert main(["features", str(tmp_path / "a.npz"), "--out", str(features), *own]) == 0
    assert (
        main([str(tmp_path / "a.npz"), str(features), "--ref", str(ref), "--out", str(tmp_path / "m.json"), *own]) == 0
    )
    images, stream = json.loads((tmp_path / "m.json").read_text())["sets"]
    fd = f"FD[{images['features']}]"
    assert images[fd] == pytest.approx(stream[fd], rel=1e-9) and images[fd] > 0 and "FID" not in images
    assert images["samples_sha256"] == stream["samples_sha256"]
    capsys.readouterr()
    new = tmp_path / "new.safetensors"
    assert "is a features file already" in failure(capsys, "features", features, "--out", new, *own)
    assert "ends in .safetensors" in failure(capsys, *photos, "--out", tmp_path / "ref.npz")
    assert "--keep=0: must be positive" in failure(capsys, *photos, "--keep", "0", "--out", new)
    assert "--device=tpu" in failure(capsys, features, "--ref", ref, "--features", network, "--device", "tpu")
    assert "arguments are required: IMAGES; see --help" in failure(capsys, "ref", "--out", new)
    for scale in ("1", "2"):
        save(tmp_path / "run" / f"cfg{scale}", 5, 1.0)
    assert "holds 2 sample sets" in failure(capsys, "features", tmp_path / "run", "--out", new, *own)


def test_features_of_another_network_are_told_before_its_weights_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    samples, features, ours = save(tmp_path / "a", 100, 1.0), tmp_path / "f.safetensors", tmp_path / "own.safetensors"
    assert main(["features", str(samples), "--features", "digits-cnn", "--out", str(features)]) == 0
    save_features(ours, replace(load_features(features, "SAMPLES"), extractor="mean:01234567"))
    np.savez(tmp_path / "r.npz", mu=np.zeros(3), sigma=np.eye(3))
    capsys.readouterr()
    fault = "holds features of digits-cnn, --features is inception; add --features digits-cnn"
    assert f"--ref={features}: {fault}\n" in failure(capsys, samples, "--ref", features)
    assert f"SAMPLES={features}: {fault}\n" in failure(capsys, features, "--ref", tmp_path / "r.npz")
    assert f"IMAGES={features}: {fault}\n" in failure(capsys, "ref", features, "--out", tmp_path / "new.safetensors")
    assert "mean:01234567, --features is inception; name that network's file" in failure(capsys, samples, "--ref", ours)
    with pytest.raises(ConfigError, match=f"--ref={features}: {fault}"):
        Evaluator("inception", str(features))
    assert main([str(samples), "--ref", str(features), "--features", "digits-cnn", "--dry-run"]) == 0


def test_the_arrays_of_a_features_file_are_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, ref, features = save(tmp_path / "a", 100, 1.0), tmp_path / "r.safetensors", tmp_path / "f.safetensors"
    for command, path, out in (("ref", "digits", ref), ("features", str(samples), features)):
        assert main([command, path, "--features", "digits-cnn", "--out", str(out)]) == 0
    real, read = safetensors.safe_open, []

    class Watched:
        def __init__(self, path: Path, framework: str):
            self.path, self.file = path, real(path, framework)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            """As a file that is read to its end."""

        def __getattr__(self, name: str) -> object:
            read.extend([self.path] if name == "keys" else [])
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert main([str(features), "--ref", str(ref), "--features", "digits-cnn"]) == 0
    assert sorted(read) == [features, ref]


def test_table_of_fids_warns_of_small_sets():
    score = {
        "samples": "a",
        "cfg": 1.5,
        "num": 50_000,
        "FID": 2.5,
        "IS": 250.0,
        "precision": 0.8,
        "features": "inception",
    }
    few = {**score, "samples": "b", "num": 1000, "sFID": 4.0}
    for each in (score, few):
        each["sampling"] = {"sampler": "euler", "steps": 250}
    lines = format_table([score, few]).splitlines()
    assert lines[0].split() == ["samples", "sampler", "steps", "cfg", "n", "FID", "sFID", "IS", "precision"]
    assert lines[1].split() == ["a", "euler", "250", "1.5", "50000", "2.500", "-", "250.00", "0.8000"]
    assert notes([score]) == [] and "1 of 2 sets hold fewer than 50,000 images" in notes([score, few])[0]


def test_the_protocol_stands_under_the_score():
    protocol = {
        "name": "repa",
        "source": "sihyun-yu/REPA generate.py @67f7145",
        "reference": "VIRTUAL_imagenet256_labeled.npz",
        "metric": "FID",
        "changed": {},
    }
    score = {"num": 50_000, "FID": 2.5, "sampling": {"protocol": protocol}, "reference": {"name": "refs/own.npz"}}
    told = "protocol: repa (sihyun-yu/REPA generate.py @67f7145), "
    assert notes([score, score]) == [
        f"{told}unchanged",
        "note: repa scores by FID against VIRTUAL_imagenet256_labeled.npz",
    ]
    score["reference"]["name"] = "refs/VIRTUAL_imagenet256_labeled.npz"
    protocol["changed"] = {"num": 1000, "steps": 50}
    assert notes([score]) == [f"{told}but num=1000, steps=50"]
    score["sampling"]["protocol"] = "hand-written"
    assert notes([score]) == []
