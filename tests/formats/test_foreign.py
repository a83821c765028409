"""Weights of REPA, SiT, Lightning, edm2 and diffusers: forwards as of their own code, and every bad input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from launchers import import_weights
from promoe_ds.config.errors import ConfigError
from promoe_ds.formats.importing import import_checkpoint
from promoe_ds.formats.official import write_official
from promoe_ds.formats.weights import Weights, write
from tests.formats.foreign_states import LABELS, T, golden, images, repa_state, sit_state
from tests.formats.official_model import CHANNELS, CLASSES, HEADS, SIDE, D
from tests.formats.test_official import TINY, ours


def imported(path: Path, convention: str | None = None, *args: Any, **options: Any) -> Weights:
    return import_checkpoint(path, *args, convention=convention, **{"overrides": TINY} | options)


def mistake(path: Path, convention: str | None = "repa", **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        imported(path, convention, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def predicts(made: Weights, folder: Path, expected: Tensor) -> None:
    """Our forward is theirs, to what float32 sinusoids and seven digits of the file leave."""
    out = ours(write(made, folder), images(), T, LABELS)[:, :CHANNELS]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def save(tree: Any, path: Path) -> Path:
    torch.save(tree, path)
    return path


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def test_a_training_checkpoint_of_repa(tmp_path: Path) -> None:
    """With projectors, which are left out by name, and REPA's own count of steps."""
    args = argparse.Namespace(model="SiT-XL/2", resolution=256)
    file = save({"model": sit_state(), "ema": repa_state(), "opt": {}, "args": args, "steps": 300}, tmp_path / "a.pt")
    made = imported(file, "repa")
    assert made.step == 300 and made.config.model.time == "sigma" and not made.config.model.learn_sigma
    assert made.notes == ("left out 6 tensors projectors.* (REPA's projectors, which training alone uses)",)
    predicts(made, tmp_path / "made", golden("repa"))
    again = imported(file, "repa", dropped=["projectors.0.*"])  # by hand is the same
    assert again.tensors.keys() == made.tensors.keys()


def test_the_published_weights_of_repa_count_their_later_blocks_anew(tmp_path: Path) -> None:
    def named(name: str) -> str:
        parts = name.split(".")
        late = parts[0] == "blocks" and int(parts[1]) >= 1
        return ".".join(["decoder_blocks", str(int(parts[1]) - 1), *parts[2:]]) if late else name

    made = imported(save({named(k): v for k, v in repa_state().items()}, tmp_path / "last.pt"), "repa")
    assert made.notes[0] == "decoder_blocks.* follow block 0"
    predicts(made, tmp_path / "made", golden("repa"))


def test_sit(tmp_path: Path) -> None:
    made = imported(save({"model": {}, "ema": sit_state(), "opt": {}}, tmp_path / "a.pt"), "sit")
    predicts(made, tmp_path / "made", -golden("sit"))  # data - noise there
    save_file(sit_state(), tmp_path / "b.safetensors")
    bare = imported(tmp_path / "b.safetensors", "sit")
    assert all(torch.equal(bare.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_lightning(tmp_path: Path) -> None:
    """Two models under prefixes, one compiled, and the parts of the module beside them."""
    noise = {name: tensor + 1 for name, tensor in repa_state().items()}
    state = prefixed(noise, "denoiser._orig_mod.") | prefixed(repa_state(), "ema_denoiser.")
    tree = {"state_dict": state | {"vae.scale": torch.ones(1)}, "global_step": 9, "hyper_parameters": {"lr": 1e-4}}
    file = save(tree, tmp_path / "last.ckpt")
    made = imported(file, "repa")
    assert made.step == 9
    assert made.notes[:2] == (
        "read what is named ema_denoiser.*",
        f"left out {len(noise) + 1} tensors of denoiser.*, vae.*",
    )
    predicts(made, tmp_path / "made", golden("repa"))
    raw = imported(file, "repa", "raw")
    assert torch.equal(raw.tensors["blocks.0.attn.proj.bias"], noise["blocks.0.attn.proj.bias"])
    del tree["state_dict"]
    alone = save(tree | {"state_dict": prefixed(repa_state(), "model.net.")}, tmp_path / "raw.ckpt")
    assert "--weights=ema" in mistake(alone) and "holds no averaged weights (model.net.*); choose raw" in mistake(alone)
    predicts(imported(alone, "repa", "raw"), tmp_path / "raw", golden("repa"))
    two = save({"state_dict": prefixed(noise, "teacher.") | prefixed(repa_state(), "student.")}, tmp_path / "two.ckpt")
    assert "holds several models (student.*, teacher.*); --drop those" in mistake(two, source="raw")
    predicts(imported(two, "repa", "raw", dropped=["teacher.*"]), tmp_path / "student", golden("repa"))


def test_averages_of_edm2_and_of_a_wrapper(tmp_path: Path) -> None:
    noise = {name: tensor + 1 for name, tensor in repa_state().items()}
    tree = {"net": noise, "ema": {"stds": [0.05, 0.1], "emas": [noise, repa_state()]}}
    file = save(tree, tmp_path / "training-state-0001.pt")
    assert "--ema-std=none" in mistake(file) and "widths 0.05, 0.1; add --ema-std, one of 0.05, 0.1" in mistake(file)
    assert "--ema-std=0.2" in mistake(file, ema_std=0.2)
    predicts(imported(file, "repa", ema_std=0.1), tmp_path / "made", golden("repa"))
    assert "leave it out" in mistake(file, source="raw", ema_std=0.1)
    for stds, emas, text in (
        (["wide"], [noise], "holds no averages by width (ValueError: could not convert"),
        ([0.1], [], "holds no averages by width (ValueError: "),
        ([0.1], [[1]], "holds no averages by width (TypeError: "),
    ):
        assert text in mistake(save({"net": noise, "ema": {"stds": stds, "emas": emas}}, tmp_path / "odd.pt"))
    one = save({"net": noise, "ema": {"stds": [0.1], "emas": [repa_state()]}}, tmp_path / "one.pt")
    predicts(imported(one, "repa"), tmp_path / "one", golden("repa"))
    library = prefixed(repa_state(), "ema_model.") | prefixed(noise, "online_model.") | {"initted": torch.ones(1)}
    predicts(imported(save({"ema": library}, tmp_path / "lib.pt"), "repa"), tmp_path / "lib", golden("repa"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A port of DiT's weights: every block holds the same embedders. diffusers' own initialisation, made larger."""
    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS,
        num_layers=2, sample_size=SIDE, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / "dit" / "transformer")
    return tmp_path / "dit"


def test_a_folder_of_diffusers(folder: Path, tmp_path: Path) -> None:
    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer").double().eval()
    x, t = images(), torch.full((2,), T, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x, t, torch.tensor(LABELS)).sample
    made = imported(folder, overrides=["train.precision=fp32"])  # the pipeline's folder; heads and objective are known
    assert made.config.diffusion.name == "ddpm" and made.config.model.time_divisor == 127
    assert made.config.guidance.channels == "all"
    assert "facebook/DiT-XL-2-256" in made.notes[0]
    out = ours(write(made, tmp_path / "made"), x, T, LABELS)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # the eps of a norm, 1e-5 there, is 1e-6 here
    dit = imported(folder / "transformer", overrides=["train.precision=fp32", "model.time_divisor=128"])
    assert float((ours(write(dit, tmp_path / "dit128"), x, T, LABELS) - expected).detach().abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="has model.time_divisor=128, this one 127"):
        write_official(made, made, tmp_path / "back.pth")


def test_folders_of_diffusers_in_parts_and_as_pickles(folder: Path, tmp_path: Path) -> None:
    whole = imported(folder, overrides=["train.precision=fp32"])
    model: Any = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    for name, how in (("parts", {"max_shard_size": "50KB"}), ("bin", {"safe_serialization": False})):
        model.save_pretrained(tmp_path / name, **how)
        made = imported(tmp_path / name, overrides=["train.precision=fp32"])
        assert all(torch.equal(made.tensors[key], tensor) for key, tensor in whole.tensors.items()), name


def test_folders_of_diffusers_that_are_refused(folder: Path, tmp_path: Path) -> None:
    inner = folder / "transformer"
    assert "has no config.json" in mistake(tmp_path)
    config = json.loads((inner / "config.json").read_text())
    for change, text in (
        ({"_class_name": "PixArtTransformer2DModel"}, "describes a PixArtTransformer2DModel; name a folder of DiT"),
        ({"attention_bias": False}, "attention_bias is false, which is not built here; it must be true"),
        ({"activation_fn": "geglu"}, "activation_fn is geglu, which is not built here; it must be gelu-approximate"),
        ({"norm_eps": 1e-3}, "norm_eps is 0.001"),
        ({"num_layers": "many"}, "cannot be used (ValueError"),
        ({"patch_size": 0}, "cannot be used (ValueError('patch_size is 0"),
        ({"num_layers": 1}, "transformer_blocks.1.attn1.to_k.bias is unexpected"),
    ):
        (inner / "config.json").write_text(json.dumps(config | change))
        assert text in mistake(folder, None)
    (inner / "config.json").write_text(json.dumps(config))
    model: Any = DiTTransformer2DModel.from_pretrained(inner)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[0] = 3.0
    model.save_pretrained(tmp_path / "trained")
    assert "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias differs from block 0's" in mistake(
        tmp_path / "trained"
    )
    (inner / "diffusion_pytorch_model.safetensors").unlink()
    assert "diffusion_pytorch_model.bin: no such file" in mistake(folder)
    (inner / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert "is no index of weights (KeyError" in mistake(folder)
    (inner / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "is no index of weights (TypeError" in mistake(folder)


def test_what_is_dropped(tmp_path: Path) -> None:
    extra = repa_state() | {"logvar.weight": torch.ones(3)}
    file = save({"ema": extra}, tmp_path / "a.pt")
    assert "logvar.weight is unexpected" in mistake(file)
    made = imported(file, "repa", dropped=["logvar.*"])
    assert made.notes[-1] == "left out 1 tensor logvar.*"
    assert "--drop=heads.*: matches no name in" in mistake(file, dropped=["logvar.*", "heads.*"])
    needed = mistake(file, dropped=["logvar.*", "blocks.3.*"])
    assert needed.startswith("--drop=blocks.3.*: matches blocks.3.adaLN_modulation.1.bias, which the model needs")
    assert "--drop=*: matches" in mistake(file, dropped=["*"])


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("blocks.1.moe.experts.0.gate_proj.weight", "DiT-MoE (feizc)"),
        ("blocks.1.mlp.gate.e_score_correction_bias", "DSMoE"),
        ("denoiser.patch_blocks.0.mlp.w3.weight", "PixelDiT"),
        ("blocks.0.mlp.w12.weight", "LightningDiT"),
        ("blocks.0.norm1.weight", "LightningDiT"),
    ],
)
def test_models_that_are_not_built_here_are_named(name: str, who: str, tmp_path: Path) -> None:
    file = save({"ema": repa_state() | {name: torch.ones(3)}}, tmp_path / "a.pt")
    text = mistake(file)
    assert f"{name} is of {who}" in text and "not built here; name a checkpoint of a diffusion" in text


def test_the_command_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = repa_state() | {"logvar.weight": torch.ones(3)}
    file = save({"ema": state, "steps": 5}, tmp_path / "a.pt")
    import_weights.bring(
        [str(file), "--out", str(tmp_path / "made"), "--convention", "repa", "--drop", "logvar.*", *TINY]
    )
    out = capsys.readouterr().out
    assert "left out 6 tensors projectors.*" in out and "left out 1 tensor logvar.*" in out and "step 5" in out
