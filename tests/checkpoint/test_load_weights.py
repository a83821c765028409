"""Weights are found, read and checked; what is missing, damaged or unreadable is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.load_weights import find_weights, load_ema
from promoe_ds.config.decode import dump
from promoe_ds.config.errors import ConfigError
from tests.disk import loop
from tests.small_model import save, tiny


def test_weights_come_back_with_config_and_step(tmp_path: Path) -> None:
    dit, config = tiny()
    loaded, loaded_config, step = load_ema(save(tmp_path / "ema.safetensors", dit, config))
    assert (loaded_config, step) == (config, 7)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in dit.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def complete(folder: Path, names: tuple[str, ...] = ("ema.safetensors",)) -> None:
    """Write the manifest that makes a checkpoint folder complete."""
    files = {name: {"bytes": (folder / name).stat().st_size, "blake2b": ""} for name in names}
    tree = {"format": "promoe_ds/1", "step": int(folder.name.split("_")[-1]), "files": files}
    layout.write_manifest(folder, tree)


def test_weights_are_found_by_file_checkpoint_and_run(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000020", "tmp_step_00000030"):
        complete(save(tmp_path / "checkpoints" / name / "ema.safetensors", *tiny()).parent)
    newest = tmp_path / "checkpoints/step_00000020/ema.safetensors"
    assert find_weights(tmp_path) == find_weights(newest.parent) == find_weights(newest) == newest


def test_an_older_checkpoint_never_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    old, new = (save(tmp_path / f"checkpoints/step_{step:08d}/ema.safetensors", *tiny()) for step in (1, 2))
    complete(new.parent)
    new.write_bytes(new.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="step_00000002: is damaged: .*no whole checkpoint is left"):
        find_weights(tmp_path)
    complete(old.parent)
    with pytest.raises(ConfigError, match=f"step_00000002: is damaged: .*; remove it, or add --model {old.parent}$"):
        find_weights(tmp_path)


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--run=.*nowhere: no such file or folder"):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="^--model=.*holds no complete checkpoint; train first"):
        find_weights(tmp_path, "--model")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a diffusers pipeline; load it with Diff"):
        find_weights(tmp_path / "pipe")
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    complete(tmp_path / "checkpoints/step_00000001", ())
    with pytest.raises(ConfigError, match="has no ema.safetensors"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "model.safetensors.index.json"])
def test_weights_that_cannot_be_read_are_neither_missing_nor_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights").mkdir()
    for path in (tmp_path / "weights" / name, tmp_path / "weights"):
        loop(path)
        with pytest.raises(ConfigError, match=r"^--model=.*weights.*: cannot be read \(Too many levels"):
            find_weights(path, "--model")
        with pytest.raises(ConfigError, match=r"^--run=.*weights.*: cannot be read \(Too many levels"):
            load_ema(tmp_path / "weights")


def test_a_shard_that_cannot_be_read_is_not_damaged(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(ConfigError, match="a.safetensors: is damaged or no safetensors file"):
        load_ema(index)
    loop(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"^weights=.*a.safetensors: cannot be read \(Too many levels"):
        load_ema(index)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    file = save(tmp_path / "ema.safetensors", *tiny())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="ema.safetensors: is damaged or no safetensors file") as raised:
        load_ema(file)
    assert "\n" not in str(raised.value)
    file.write_text("nonsense")
    with pytest.raises(ConfigError, match="is damaged"):
        load_ema(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other/9"}, "has format 'other/9', expected 'promoe_ds/1'"),
        ({"config": "model: {depht: 2}"}, "metadata cannot be used .*did you mean 'depth'"),
        ({"config": "a: [b"}, "metadata cannot be used"),
        ({"step": "x"}, "metadata cannot be used"),
    ],
)
def test_unusable_metadata_is_named(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_ema(save(tmp_path / "ema.safetensors", *tiny(), metadata))
    assert "ema.safetensors" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("pos_embed"), "pos_embed is missing;"),
        (lambda t: t.update(stray=torch.zeros(1)), "stray is unexpected;"),
        (lambda t: t.update(pos_embed=torch.zeros(1, 2, 3)), r"pos_embed is torch.float32\[1, 2, 3\], expected"),
        (lambda t: t.update(pos_embed=t["pos_embed"].half()), r"pos_embed is torch.float16"),
        (lambda t: (t.pop("pos_embed"), t.update(stray=torch.zeros(1))), "pos_embed is missing and 1 more;"),
    ],
)
def test_tensors_must_fit_the_config(tmp_path: Path, change: Any, message: str) -> None:
    dit, config = tiny()
    tensors = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    change(tensors)
    file = tmp_path / "ema.safetensors"
    save_file(tensors, file, {"format": "promoe_ds/1", "config": dump(config), "step": "7"})
    with pytest.raises(ConfigError, match=message) as raised:
        load_ema(file)
    assert str(file) in str(raised.value)
