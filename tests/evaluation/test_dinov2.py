"""FD-DINOv2's network against a slow one under facebookresearch's names, its pixels and positions against loops."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from launchers import evaluate
from promoe_ds.config.errors import ConfigError
from promoe_ds.evaluation.dinov2 import DINOv2, edm2_pixels, find_dinov2, load_dinov2, shrink_positions
from tests.evaluation.random_dinov2 import SMALL, random_state, write_dinov2
from tests.evaluation.random_inception import pictures


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel, with the parameter of torch's bicubic."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_positions(table_ggd: np.ndarray, grid: int) -> np.ndarray:
    """Output i reads (i + 0.5) g / (grid + 0.1) - 0.5, four neighbours, the border repeated."""
    g = len(table_ggd)
    weights = np.zeros((grid, g))
    for i in range(grid):
        place = (i + 0.5) * g / (grid + 0.1) - 0.5
        for k in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(k, 0), g - 1)] += cubic(place - k)
    return np.einsum("ia,jb,abd->ijd", weights, weights, table_ggd)


def test_positions_are_facebookresearchs_and_no_other_programs():
    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    found = shrink_positions(table)
    assert torch.equal(found[:, 0], table[:, 0])
    grid = table[0, 1:].reshape(37, 37, 8)
    slow = slow_positions(grid.double().numpy(), 16)
    np.testing.assert_allclose(found[0, 1:].reshape(16, 16, 8).numpy(), slow, rtol=0, atol=2e-5)
    for antialias in (False, True):  # by size: transformers' rule; with antialiasing: that of registers and timm
        other = F.interpolate(grid.permute(2, 0, 1)[None], (16, 16), mode="bicubic", antialias=antialias)
        assert (other[0].permute(1, 2, 0).numpy() - slow).std() > 0.05


def test_pixels_against_pillow():
    """Pillow rounds twice, after rows and columns of the same antialiased cubic; it also clips where edm2 does not, so
    the pictures stay away from black and white."""
    images = pictures(2, 3, (240, 304)) // 3 + 80
    found = edm2_pixels(torch.tensor(images))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (found.permute(0, 2, 3, 1).numpy() * deviation + mean) * 255
    for mine, image in zip(pixels, images, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
        assert np.abs(mine - theirs).max() < 1.25


def slow_tokens(state: dict[str, torch.Tensor], x_NCHW: torch.Tensor) -> torch.Tensor:
    """The network by its equations, in float64: pre-norm blocks with layer scale, exact GELU, eps 1e-6."""
    w = {name: tensor.double() for name, tensor in state.items()}
    d, heads = SMALL.width, SMALL.heads

    def affine(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    patches = F.unfold(x_NCHW.double(), 14, stride=14).transpose(1, 2)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + shrink_positions(state["pos_embed"]).double()
    for i in range(SMALL.depth):
        b = f"blocks.{i}"
        qkv = affine(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).unflatten(2, (3, heads, d // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(-1, -2) * (d // heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w[f"{b}.ls1.gamma"] * affine(f"{b}.attn.proj", attended)
        hidden = affine(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + w[f"{b}.ls2.gamma"] * affine(f"{b}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def test_features_against_the_equations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    extractor = DINOv2(write_dinov2(tmp_path, monkeypatch))
    images = pictures(3, 5)
    features = extractor.extract(images).features_Nd
    expected = slow_tokens(random_state(), edm2_pixels(torch.tensor(images))).numpy()
    assert features.dtype == np.float32 and features.shape == (3, SMALL.width)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_the_names_of_the_hub_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_dinov2(tmp_path, monkeypatch)
    ours = load_dinov2(path, SMALL).state_dict()
    table = random_state()["pos_embed"]
    old = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
           "o_proj": "output.dense"}  # fmt: skip
    hub = {}
    for name, tensor in ours.items():
        for new, before in old.items():
            name = name.replace(f"attention.{new}", f"attention.{before}")
        hub[name] = table if name.endswith("position_embeddings") else tensor.contiguous()
    safetensors.torch.save_file(hub, tmp_path / "model.safetensors")
    again = load_dinov2(tmp_path / "model.safetensors", SMALL).state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"register_tokens": torch.zeros(1, 4, 32)}, r"register_tokens is \[1, 4, 32\], the network has none"),
        ({"pos_embed": torch.zeros(1, 257, 32)}, r"position_embeddings is \[1, 257, 32\]"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)}, r"projection.weight is \[32, 3, 16, 16\]"),
        ({"blocks.2.norm1.weight": torch.zeros(32)}, r"encoder.layer.2.norm1.weight is \[32\], the network has none"),
        ({"cls_token": torch.zeros(1, 1, 64)}, "cls_token is"),
    ],
)
def test_weights_of_another_transformer(
    change: dict[str, torch.Tensor], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_dinov2(tmp_path, monkeypatch)
    torch.save(random_state() | change, path)
    with pytest.raises(ConfigError, match=expected) as caught:
        DINOv2(path)
    assert "ViT-L/14 without registers" in str(caught.value) and "\n" not in str(caught.value)


def test_no_weights_and_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="--dinov2-weights=.*absent.*not there"):
        find_dinov2(tmp_path / "absent")
    with pytest.raises(ConfigError, match="DINOV2_WEIGHTS=.*nothing is downloaded"):
        find_dinov2(None, {"DINOV2_WEIGHTS": str(tmp_path / "absent")})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no DINOv2 weights in"):
        find_dinov2(None, {})
    path = write_dinov2(tmp_path, monkeypatch)
    assert find_dinov2(None, {"DINOV2_WEIGHTS": str(path)}) == path
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="transformers is not installed; pip install"):
        load_dinov2(path)


def test_the_command_names_the_weights_and_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_dinov2(tmp_path, monkeypatch)
    for name, seed in (("a", 1), ("b", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures(9, seed))
    out = tmp_path / "m.json"
    options = ["--features", "dinov2", "--dinov2-weights", str(path), "--device", "cpu"]
    assert evaluate.main([str(tmp_path / "a.npz"), "--ref", str(tmp_path / "b.npz"), "--out", str(out), *options]) == 0
    score = json.loads(out.read_text())
    name = score["features"]
    assert name == f"dinov2:{score['evaluation']['weights_sha256'][:8]}"
    assert score[f"FD[{name}]"] > 0 and {f"KD[{name}]", f"density[{name}]"} < score.keys() and "FID" not in score
    assert "16.1/37" in score["evaluation"]["positions"] and "antialias" in score["evaluation"]["resize"]
    wrong = ["--ref", str(tmp_path / "b.npz"), "--features", "digits-cnn", "--dinov2-weights", str(path)]
    assert evaluate.main([str(tmp_path / "a.npz"), *wrong]) == 2
