"""What a folder of samples is made of: pictures, packs, decoded latents, features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from promoe_ds.checkpoint.load_weights import load_ema
from promoe_ds.data.codecs import open_codec
from promoe_ds.diffusion.guidance import guided_prediction
from promoe_ds.diffusion.objective import Solver, make_objective
from promoe_ds.evaluation.collect import FeatureSet, collect
from promoe_ds.evaluation.feature_store import FeatureStore
from promoe_ds.evaluation.features import DigitsCNN
from promoe_ds.evaluation.samples import load_samples
from promoe_ds.sampling.generate import image_noise, to_pixels
from promoe_ds.sampling.store import BatchStore, read_image
from tests.photographs import tiny_kl
from tests.sample_folder import Command, assert_same_images, read_npz, sample_command, write_run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return sample_command(monkeypatch)


def test_one_scale_fills_the_folder(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", write_run(tmp_path)
    assert command("--model", file, "--out", out) == 0
    images, labels = read_npz(out / "samples.npz")
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 1) and images.std() > 20
    assert labels.dtype == np.int64 and labels.tolist() == [*range(10), 0, 1]
    assert read_image(out / "000011_class1.png", (8, 8, 1)) is not None
    names = {f"{i:06d}_class{i % 10}.png" for i in range(12)}
    names |= {"samples.npz", "grid.png", "sampling.json", "config.yaml"}
    assert {path.name for path in out.iterdir()} == names
    for i in range(12):
        np.testing.assert_array_equal(read_image(out / f"{i:06d}_class{i % 10}.png", (8, 8, 1)), images[i])
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (10 * 50 + 2, 2 * 50 + 2)
    record = json.loads((out / "sampling.json").read_text())
    assert record["checkpoint"] == "checkpoints/step_00000007/ema.safetensors" and record["checkpoint_step"] == 7
    assert (record["config"], record["cfg"], record["steps"], record["seed"], record["num"], record["precision"]) == (
        "tiny",
        1.5,
        2,
        0,
        12,
        "fp32",
    )
    assert record["command"].startswith("launchers/sample.py --num 12") and record["versions"]["torch"]
    printed = capsys.readouterr()
    assert "12 images at cfg 1.5" in printed.out and "12/12" in printed.err


def test_colour_images(command: Command, tmp_path: Path) -> None:
    assert command("--model", write_run(tmp_path, channels=3), "--out", tmp_path / "out", "--num", 3) == 0
    images, _ = read_npz(tmp_path / "out/samples.npz")
    np.testing.assert_array_equal(read_image(tmp_path / "out/000002_class2.png", (8, 8, 3)), images[2])


@pytest.mark.parametrize("own", [{}, {"scale": [0.5, 0.4, 0.3, 0.2], "shift": [0.1, 0.0, -0.3, 0.2], "digest": ""}])
def test_latents_are_decoded(command: Command, tmp_path: Path, own: dict[str, Any]) -> None:
    file, vae = write_run(tmp_path, channels=4), tiny_kl(tmp_path / "kl")
    codec = open_codec(str(vae))
    (tmp_path / "codec.json").write_text(json.dumps(codec.record() | own))
    words = ["--model", file, "--vae", vae, "--num", 5, "--cfg", 1]
    assert command(*words, "--out", tmp_path / "out") == 0
    images, labels = read_npz(tmp_path / "out/samples.npz")
    assert images.shape == (5, 16, 16, 3)
    model, config, _ = load_ema(file)
    noise = image_noise(0, np.arange(5), (4, 8, 8))
    predict = guided_prediction(model, torch.from_numpy(labels), 10, 1.0, torch.device("cpu"))
    with torch.no_grad():
        x = make_objective(config.diffusion).sample(predict, lambda step: noise, Solver("euler", 2))
        scale, shift = (
            torch.tensor(own.get(key, one)).view(-1, 1, 1) for key, one in (("scale", 0.18215), ("shift", 0))
        )
        drawn = to_pixels(codec.decode(x / scale + shift))
    assert_same_images(images, drawn)
    record = json.loads((tmp_path / "out/sampling.json").read_text())
    assert record["vae"] == f"AutoencoderKL {codec.digest}"
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["channels"] == 4


def test_packs_without_pictures_are_resumed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_run(tmp_path), tmp_path / "out"
    words = ["--model", file, "--num", 23, "--labels", "random"]
    assert command(*words, "--out", tmp_path / "whole") == 0
    write, batches = BatchStore.write, []

    def stop_after_two(self: BatchStore, indices: np.ndarray, images: np.ndarray) -> None:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(indices)
        write(self, indices, images)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "write", stop_after_two)
        assert command(*words, "--format", "npz", "--out", out, "--batch", 4) == 130
    kept = {path: path.stat().st_mtime_ns for path in out.glob("made-*.npy")}
    assert len(kept) == 2 and not (out / "samples.npz").exists()
    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "write", lambda self, i, x: (made.extend(i.tolist()), write(self, i, x)))
        assert command(*words, "--format", "npz", "--out", out, "--batch", 7) == 0
    assert made == list(range(8, 23))
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png", "sampling.json", "config.yaml"}
    whole, labels = read_npz(tmp_path / "whole/samples.npz")
    again, labels_again = read_npz(out / "samples.npz")
    assert_same_images(whole, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert len(set(labels.tolist())) > 1 and labels.tolist() != (np.arange(23) % 10).tolist()
    time = (out / "samples.npz").stat().st_mtime_ns
    assert command(*words, "--format", "npz", "--out", out) == 0
    assert (out / "samples.npz").stat().st_mtime_ns == time  # nothing was left to do


def test_straight_to_features(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: the features of the folder are those of the pictures it would have held; a run cut short goes on."""
    run = write_run(tmp_path / "run")
    options = ["--run", str(run), "--num", "23", "--steps", "2", "--cfg", "1", "--batch", "5"]
    assert command(*options, "--format", "npz", "--out", str(tmp_path / "npz")) == 0
    features = [*options, "--format", "features", "--features", "digits-cnn", "--out", str(tmp_path / "features")]
    calls = []

    def cut(self: FeatureStore, indices: np.ndarray, images: np.ndarray) -> None:
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, indices, images)

    write = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", cut)
    assert command(*features) == 130
    monkeypatch.setattr(FeatureStore, "write", write)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").glob("made-*")}
    assert len(before) == 2
    assert command(*features) == 0
    assert {p.name for p in (tmp_path / "features").iterdir()} == {
        "features.safetensors", "sampling.json", "config.yaml", "grid.png",
    }  # fmt: skip
    found = load_samples(tmp_path / "features/features.safetensors")
    wanted = collect(DigitsCNN(), load_samples(tmp_path / "npz/samples.npz"))  # type: ignore[arg-type]
    assert isinstance(found, FeatureSet) and wanted is not None
    np.testing.assert_allclose(found.features_Nd, wanted.features_Nd, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.gaussian.sigma_dd, wanted.gaussian.sigma_dd, rtol=1e-4, atol=1e-5)
    assert found.sha256 == wanted.sha256 and found.sampling["features"] == "digits-cnn"
    np.testing.assert_array_equal(found.labels_N, np.arange(23) % 10)
    stamp = (tmp_path / "features/features.safetensors").stat().st_mtime_ns
    assert command(*features) == 0 and (tmp_path / "features/features.safetensors").stat().st_mtime_ns == stamp
    assert command(*options, "--format", "npz", "--out", str(tmp_path / "features")) == 2  # other content
