"""Official checkpoints: what is read computes what the papers say, every key is accounted for, and nothing is lost."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launchers import export, import_weights
from promoe_ds.checkpoint.load_weights import find_weights, load_ema
from promoe_ds.config.errors import ConfigError
from promoe_ds.formats.importing import describe, import_checkpoint
from promoe_ds.formats.official import check_layout, to_official
from promoe_ds.formats.weights import load, write
from promoe_ds.models.init import build
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.recipes.load import load_config
from tests.formats.official_model import CHANNELS, CLASSES, FAMILIES, HEADS, SIDE, forward, random_state, shapes

TINY = [f"model.heads={HEADS}", "train.precision=fp32"]


def save(path: Path, family: str, **tree: Any) -> Path:
    both = {"model_state_dict": random_state(family, 1), "ema_model_state_dict": random_state(family)}
    torch.save(tree or {"step": 7, **both, "optimizer_state_dict": {"state": {}}}, path)
    return path


def mistake(path: Path, *args: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        import_checkpoint(path, *args, **{"overrides": TINY} | options)
    assert "\n" not in str(error.value)
    return str(error.value)


def ours(path: Path, x: Tensor, t: float, labels: list[int]) -> Tensor:
    model = load_ema(path)[0].double()
    for module in model.modules():
        if isinstance(module, StackedExperts):
            module.backend = "loop"  # grouped GEMM has no float64
    return model(x, torch.full((len(labels),), t), torch.tensor(labels)).prediction


@pytest.mark.parametrize("family", FAMILIES)
def test_import_computes_what_the_paper_says_and_nothing_is_lost(family: str, tmp_path: Path) -> None:
    """Import, forward, export to the official layout, import again."""
    file = save(tmp_path / "ckpt_step_7.pth", family)
    made = import_checkpoint(file, family="promoe_ec" if family == "promoe_ec" else None, overrides=TINY)
    moe = made.config.moe
    assert (moe.router.name if moe else "dense", made.step) == (family, 7)
    write(made, tmp_path / "model", limit=40_000)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    x = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, t = [0, CLASSES, 3], 321.5
    out = ours(tmp_path / "model", x, t, labels)
    for i, label in enumerate(labels):
        expected = forward(random_state(family), family, x[i], t, label)
        torch.testing.assert_close(out[i], expected, rtol=1e-3, atol=2e-4)  # sinusoids are float32 by design
    export.export(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "back.pth"), "--format", "official"])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["step"] == 7 and back["ema_model_state_dict"].keys() == shapes(family).keys()
    for name, tensor in random_state(family).items():
        assert torch.equal(back["ema_model_state_dict"][name], tensor), name
    again = import_checkpoint(tmp_path / "back.pth", family=family, overrides=TINY)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in made.tensors.items())
    sharded = load(tmp_path / "model")
    assert sharded.config == made.config and sharded.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(sharded.tensors[name], tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize(
    ("convention", "their_time", "sign"),
    [("sit", lambda t: 1 - t / 1000, -1), ("repa", lambda t: t / 1000, 1), ("ddpm", lambda t: t, 1)],
)
def test_conventions_of_time_and_sign(convention: str, their_time: Any, sign: int, tmp_path: Path) -> None:
    """Bare state dicts and training checkpoints of DiT and SiT. Our prediction at t is theirs at their time, signed."""
    file, state = tmp_path / "model.pt", random_state("dense")
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    save(file, "dense", **(state if convention == "ddpm" else {"ema": state, "model": state, "opt": {}, "args": args}))
    assert "--convention=none" in mistake(file) and "sit (SiT" in mistake(file)
    made = import_checkpoint(file, convention=convention, overrides=TINY)
    c = made.config
    assert c.diffusion.name == ("ddpm" if convention == "ddpm" else "rectified_flow")
    assert c.guidance.channels == ("all" if convention == "repa" else 3)
    assert c.diffusion.timesteps == ("logit_normal" if convention == "ddpm" else "uniform"), "as that code trains"
    write(made, tmp_path / "model")
    x = torch.randn(1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = 250.0
    out = ours(tmp_path / "model", x, t, [1])[0]
    torch.testing.assert_close(out, sign * forward(state, "dense", x[0], their_time(t), 1), rtol=1e-3, atol=2e-4)
    back = to_official(made.tensors, c)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pth"

    def complaint(**changes: Any) -> str:
        state = random_state("promoe") | changes
        save(file, "promoe", ema_model_state_dict={k: v for k, v in state.items() if v is not None})
        return mistake(file)

    name = "blocks.1.mlp.experts.3.up_proj.bias"
    assert f"{name} is missing" in complaint(**{name: None})
    assert "blocks.0.attn.rope is unexpected" in complaint(**{"blocks.0.attn.rope": torch.zeros(2)})
    assert f"{name} has shape [3], expected [64]" in complaint(**{name: torch.zeros(3)})
    assert f"{name} is int64, expected floats" in complaint(**{name: torch.zeros(64, dtype=torch.int64)})
    many = complaint(**{k: None for k in shapes("promoe") if "shared_expert" in k})
    assert "; and 2 more" in many and "keys expected" in many
    assert "pos_embed is missing" in complaint(pos_embed=None)
    assert "pos_embed has 15 tokens, no square" in complaint(pos_embed=torch.zeros(1, 15, 32))
    assert "'scale' is no tensor" in complaint(scale=3)


def test_what_weights_do_not_tell(tmp_path: Path) -> None:
    file = save(tmp_path / "ckpt.pth", "promoe")
    assert "add model.heads=N" in mistake(file, overrides=["train.precision=fp32"])
    assert "are those of promoe" in mistake(file, family="diffmoe")
    assert "must be one of dense, promoe" in mistake(file, family="mixtral")
    raw = import_checkpoint(file, "raw", overrides=TINY)
    assert torch.equal(raw.tensors["pos_embed"], random_state("promoe", 1)["pos_embed"])
    save(file, "promoe", ema_model_state_dict=random_state("promoe"))
    assert "--weights=raw" in mistake(file, "raw")
    normed = {f"module.{k}": v for k, v in random_state("dense", qk_norm=True).items()}
    save(file, "dense", ema_model_state_dict=normed)
    config = import_checkpoint(file, overrides=["train.precision=fp32"]).config
    assert config.model.qk_norm and config.model.heads == HEADS
    assert config.model.num_classes == CLASSES and config.model.learn_sigma and config.model.image_size == SIDE


class Unknown:
    """A class of the project that wrote a file."""


NAMED = f" ({Unknown.__module__}.Unknown)"


@pytest.mark.parametrize(
    ("write", "asks"),
    [
        (lambda file: torch.save({"a": Unknown()}, file), NAMED),
        (lambda file: torch.save({"a": Unknown()}, file, _use_new_zipfile_serialization=False), NAMED),
        (lambda file: file.write_bytes(pickle.dumps({"a": Unknown()}, 4)), ""),
    ],
    ids=["zip", "legacy", "pickle"],
)
def test_a_file_of_more_than_tensors_is_refused_without_advice_to_run_it(
    tmp_path: Path, write: Callable[[Path], Any], asks: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "ckpt.pkl"
    write(file)
    text = mistake(file)
    assert f"does not load as plain tensors (it holds more than tensors{asks}, which could run code" in text
    assert text.endswith("; get one of tensors alone") and "weights_only" not in text and "trust" not in text
    assert not recwarn.list


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pth"
    assert "no such file" in mistake(file)
    file.write_bytes(b"nothing")
    assert "does not load as plain tensors" in mistake(file)
    torch.save([1, 2], file)
    assert "holds a list" in mistake(file)
    torch.save({}, file)
    assert "is empty" in mistake(file)
    torch.save({"step": 3}, file)
    assert "'step' is no tensor" in mistake(file)
    torch.save({0: torch.zeros(1)}, file)
    assert "0 is no tensor" in mistake(file)
    empty = random_state("dense") | {"blocks.0.attn.q_norm.weight": torch.zeros(0)}
    assert "q_norm.weight is empty" in mistake(save(file, "dense", ema_model_state_dict=empty))
    hollow = random_state("promoe") | {"blocks.1.mlp.experts.0.up_proj.weight": torch.zeros(64, 0)}
    text = "blocks.1.mlp.experts.0.up_proj.weight is empty"
    assert text in mistake(save(file, "promoe", ema_model_state_dict=hollow))
    odd = save(file, "dense", step="last", ema_model_state_dict=random_state("dense"))
    assert import_checkpoint(odd, overrides=TINY).step == 0


def test_a_truncated_weights_folder_is_named_before_it_is_read(tmp_path: Path) -> None:
    out = write(
        import_checkpoint(save(tmp_path / "ckpt_step_7.pth", "dense"), overrides=TINY), tmp_path / "out", limit=40_000
    )
    (out / "config.json").write_text("edited, and never read")
    assert find_weights(out).name == "model.safetensors.index.json"
    part = sorted(out.glob("model-*"))[-1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    sizes = f"{part.name} has {len(whole) - 5} bytes instead of {len(whole)}"
    text = f"--run={out}: is damaged: {sizes}; copy or export it again"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        load_ema(out)
    part.unlink()
    with pytest.raises(ConfigError, match=f"is damaged: {part.name} is missing; copy or export it again"):
        load_ema(out)


def test_the_heads_of_diffmoe_s_are_not_guessed(tmp_path: Path) -> None:
    state = {name: torch.zeros(1).expand(384 if "embed" in name else 1) for name in shapes("diffmoe")}
    for name, shape in {
        "x_embedder.proj.weight": (384, 4, 2, 2), "pos_embed": (1, 64, 384), "final_layer.linear.bias": (32,),
        "y_embedder.embedding_table.weight": (1001, 384), "blocks.1.mlp.experts.0.fc1.weight": (1536, 384),
    }.items():  # fmt: skip
        state[name] = torch.zeros(1).expand(shape)
    with pytest.raises(ConfigError, match="add model.heads=N"):
        describe(state, tmp_path, None, "sit")
    assert describe(state, tmp_path, None, "sit", ["model.heads=16"]).model.heads == 16
    assert describe(state, tmp_path, None, "promoe").model.heads == 6


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [("imagenet256_promoe_b", 450), ("imagenet256_promoe_l", 888), ("imagenet256_promoe_ec_xl", 1034)],
)
def test_the_published_number_of_keys(recipe: str, keys: int) -> None:
    config = load_config(recipe)
    layout = to_official(dict(build(config).state_dict()), config)
    assert len(layout) == keys
    assert layout["blocks.1.mlp.experts.12.up_proj.weight"].shape == (2 * config.model.width, config.model.width)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.router.name=kmeans", "it has no router kmeans"),
        ("moe.num_shared=2", "moe.num_shared and moe.num_unconditional must be 1 and 1 there"),
        ("moe.router.bias_rate=0.01", "its routers do not compute moe.router.bias_rate=0.01"),
        ("moe.router={name: token_choice, score: sigmoid}", "its routers do not compute moe.router.score=sigmoid"),
        ("moe.router_input=plain", "its routers see modulated tokens, not moe.router_input=plain"),
    ],
)
def test_models_that_the_official_code_has_not(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(load_config("tiny", [override]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_launchers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = save(tmp_path / "ckpt_step_7.pth", "diffmoe"), tmp_path / "out"

    def run(module: Any, *args: object) -> int:
        monkeypatch.setattr("sys.argv", ["x", *map(str, args)])
        return module.main()

    assert run(import_weights, file, "--out", out, "--dry-run", *TINY) == 0
    assert "every key accounted for" in capsys.readouterr().out and not out.exists()
    assert run(import_weights, file, "--out", out, *TINY) == 0
    assert run(import_weights, file, "--out", out, *TINY) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    copy = tmp_path / "bf16"
    assert run(export, "--model", out, "--out", copy, "--dtype", "bf16", "--dry-run") == 0 and not copy.exists()
    assert run(export, "--model", out, "--out", copy, "--dtype", "bf16") == 0
    a, b = load_ema(out)[0], load_ema(copy)[0]
    threshold = a.state_dict()["blocks.1.mlp.router.threshold"]
    assert torch.equal(b.state_dict()["blocks.1.mlp.router.threshold"], threshold)
    assert torch.equal(b.state_dict()["pos_embed"], a.state_dict()["pos_embed"].bfloat16().float())
    assert "| experts | 4 routed by `diffmoe`" in (copy / "README.md").read_text()
    assert load_config(str(copy / "config.yaml")) == load_ema(copy)[1]
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"sets": [{"num": None, "sampling": {"checkpoint_step": load_ema(out)[2]}}]}))
    for bad, text in (
        (["--model", out, "--out", copy], "exists"),
        (["--model", out, "--out", tmp_path / "x", "--weights", "raw"], "holds ema weights alone"),
        (["--model", out, "--out", tmp_path / "x", "--vae", out], "belongs to --format diffusers"),
        (["--model", out, "--out", tmp_path / "x", "--format", "diffusers", "--vae", out], "holds no diffusion_py"),
        (["--model", out, "--out", tmp_path / "x", "--format", "official", "--dtype", "bf16"], "leave it out"),
        (["--model", out, "--out", tmp_path / "x", "--shard-gb", "0"], "must be positive"),
        (["--model", out, "--out", tmp_path / "x", "--metrics", file], "holds no scores"),
        (["--model", out, "--out", tmp_path / "x", "--metrics", odd], "holds no scores"),
        (["--model", tmp_path / "no", "--out", tmp_path / "x"], "no such file or folder"),
    ):
        capsys.readouterr()
        assert run(export, *bad) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err
    for module in (export, import_weights):
        with pytest.raises(SystemExit):
            run(module, "--help")
        assert "examples:" in capsys.readouterr().out
    assert importlib.import_module("launchers.export") is export
