"""The network, its weights, and the command line on it: random weights, golden numbers of torch-fidelity 0.4.0."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from launchers import evaluate
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.collect import load_features
from promoe_ds.evaluation.inception import (
    Inception,
    InceptionV3,
    find_weights,
    fold_norms,
    load_inception,
    resize_tf1,
)
from tests.evaluation.conftest import Scored
from tests.evaluation.random_inception import BATCH, pictures
from tests.evaluation.torch_fidelity_oracle import GOLDEN, REFERENCE, SAMPLES
from tests.launch import run, torchrun


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def test_features_are_torch_fidelitys(scored: Scored):
    golden = np.load(GOLDEN)
    assert scored.features.features_Nd is not None and scored.features.logits_NK is not None
    assert scored.features.features_Nd.shape == (SAMPLES[0], 2048)
    assert relative(scored.features.features_Nd[:2], golden["pool"]) < 1e-5
    assert relative(scored.features.logits_NK[:2], golden["logits"]) < 1e-5


def test_spatial_features_are_torch_fidelitys_in_nhwc_order(scored: Scored):
    golden = np.load(GOLDEN)["spatial"]
    net = load_inception(scored.weights)
    with torch.inference_mode():
        spatial = net(torch.tensor(pictures(*SAMPLES)[:1]).permute(0, 3, 1, 2))[1].numpy()
    assert spatial.shape == (1, 17 * 17 * 7)
    assert relative(spatial, golden[:1]) < 1e-5
    channels_first = spatial.reshape(1, 17, 17, 7).transpose(0, 3, 1, 2).reshape(1, -1)
    assert relative(channels_first, golden[:1]) > 0.1


def test_metrics_are_torch_fidelitys(scored: Scored):
    golden, metrics = json.loads(str(np.load(GOLDEN)["metrics"])), scored.metrics
    name = metrics["features"]
    assert name.startswith("inception:") and len(name) == 18
    for key, called in {"FID": "FD", "sFID": "sFD", "IS": "IS", "precision": "precision", "recall": "recall"}.items():
        assert metrics[f"{called}[{name}]"] == pytest.approx(golden[key], rel=1e-5), key
    assert not {"FID", "sFID", "KID", "IS", "precision", "recall", "density", "label_agreement"} & metrics.keys()
    assert {f"KD[{name}]", f"density[{name}]", f"coverage[{name}]"} < metrics.keys()


def test_record_says_how(scored: Scored):
    metrics = scored.metrics
    assert metrics["num"] == SAMPLES[0] and metrics["cfg"] == 1.5
    assert metrics["sampling"] == {"cfg": 1.5, "sampler": "heun", "steps": 10, "precision": "bf16"}
    assert metrics["reference"]["num"] == REFERENCE[0] == metrics["evaluation"]["reference_features"]
    assert len(metrics["reference"]["sha256"]) == len(metrics["evaluation"]["weights_sha256"]) == 64
    assert metrics["samples_sha256"] == scored.features.sha256 != metrics["reference"]["sha256"]


def test_two_processes_give_the_features_of_one(scored: Scored):
    out = scored.folder / "two.safetensors"
    options = ["--inception-weights", str(scored.weights), "--batch", str(BATCH), "--device", "cpu", "--out", str(out)]
    run(torchrun(2, "launchers/evaluate.py", "features", str(scored.folder / "samples.npz"), *options))
    one, two = scored.features, load_features(out, "SAMPLES")
    assert (two.num, two.sha256, two.sampling) == (one.num, one.sha256, one.sampling)
    for key in ("features_Nd", "logits_NK", "labels_N"):
        np.testing.assert_allclose(getattr(two, key), getattr(one, key), rtol=0, atol=2e-5)
    for mine, theirs in ((two.gaussian, one.gaussian), (two.spatial, one.spatial)):
        assert mine is not None and theirs is not None
        assert relative(mine.mu_d, theirs.mu_d) < 1e-6 and relative(mine.sigma_dd, theirs.sigma_dd) < 1e-5


def test_folded_norms_change_no_feature(scored: Scored):
    images = pictures(*SAMPLES)[:2]
    with torch.inference_mode():
        plain = load_inception(scored.weights)(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
    for key, mine, theirs in zip(
        ("pool", "spatial", "logits"), Inception(scored.weights).extract(images), plain, strict=True
    ):
        assert 0 < relative(mine, theirs.numpy()) < 1e-5, key
    net = fold_norms(load_inception(scored.weights))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())


def test_resize_reads_positions_without_half_pixels():
    x = torch.tensor([[0.0, 100.0], [200.0, 300.0]])[None, None]
    y = resize_tf1(x, 4)[0, 0]
    assert y[0].tolist() == [0.0, 50.0, 100.0, 100.0]  # positions 0, 0.5, 1, 1.5: the last pixel is repeated
    assert y[:, 0].tolist() == [0.0, 100.0, 200.0, 200.0]
    assert torch.equal(resize_tf1(x, 2), x)


def test_sizes_of_the_public_files():
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    assert len(state) == 566 and state["fc.weight"].shape == (1008, 2048)
    learned = [t for name, t in state.items() if "running" not in name and "num_batches" not in name]
    assert sum(t.numel() for t in learned) == 23_850_960


def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *given: Path | None, **environ: str) -> str:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        find_weights(*given, environ=environ)
    text = str(caught.value)
    for part in (
        "pt_inception-2015-12-05-6726825d.pth",
        "release fid_weights of github.com/mseitzer/pytorch-fid",
        "weights-inception-2015-12-05-6726825d.pth",
        "release v0.2.0 of github.com/toshas/torch-fidelity",
        "SHA-256 begins with 6726825d",
        str(tmp_path / "hub" / "checkpoints"),
        "nothing is downloaded",
    ):
        assert part in text
    assert "\n" not in text
    return text


def test_absent_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "--inception-weights=(none)" in absent(tmp_path, monkeypatch)
    assert "--inception-weights=x.pth" in absent(tmp_path, monkeypatch, Path("x.pth"))
    assert "INCEPTION_WEIGHTS=y.pth" in absent(tmp_path, monkeypatch, INCEPTION_WEIGHTS="y.pth")
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.touch()
    assert find_weights(environ={}) == place
    other = tmp_path / "other.pth"
    other.touch()
    assert find_weights(environ={"INCEPTION_WEIGHTS": str(other)}) == find_weights(other, environ={}) == other


def test_the_launcher_stops_before_any_work(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    out = tmp_path / "m.json"
    assert evaluate.main(["absent.npz", "--features", "inception", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --inception-weights=(none): no Inception weights in") and error.count("\n") == 1
    assert not out.exists()


def fault(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_inception(path)
    return str(caught.value)


def test_weights_that_do_not_fit(scored: Scored, tmp_path: Path):
    state = torch.load(scored.weights, weights_only=True)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.pth"
    safetensors.torch.save_file(state, good)
    assert torch.equal(load_inception(good).fc.weight, state["fc.weight"])
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, bad)
    assert "tensor fc.weight is [1000, 2048], the network has [1008, 2048]" in fault(bad)
    torch.save({name: t for name, t in state.items() if name != "Mixed_7c.branch3x3_2b.bn.bias"}, bad)
    assert "tensor Mixed_7c.branch3x3_2b.bn.bias is missing, the network has [384]" in fault(bad)
    torch.save({"AuxLogits.fc.bias": torch.zeros(3), **state}, bad)
    assert "tensor AuxLogits.fc.bias is [3], the network has none" in fault(bad)
    torch.save({"model": state["fc.bias"], "epoch": 3}, bad)
    assert "holds no plain state dict" in fault(bad)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_are_no_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, content in (("a.pth", b"hello"), ("b.pth", pickle.dumps(Evil(), 2)), ("c.safetensors", b"\x08hello")):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read as tensors" in fault(tmp_path / name)
    torch.save(Evil(), tmp_path / "d.pth")
    assert "cannot be read as tensors" in fault(tmp_path / "d.pth")
    assert "this must not run" not in capsys.readouterr().out
