"""Fine-tuning from weights alone, by the real trainer on two ranks that share the experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launchers import export, import_weights
from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.checkpoint.upcycle import by_weight
from promoe_ds.config.decode import encode
from promoe_ds.config.errors import ConfigError
from promoe_ds.formats.weights import Weights, load, write
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_config, load_tree
from tests.formats.official_model import random_state
from tests.launch import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An official DiffMoE checkpoint, imported, and cut to the digits' one channel and ten classes."""
    torch.save({"step": 9, "ema_model_state_dict": random_state("diffmoe")}, tmp_path / "ckpt.pth")
    digits = ["data.name=digits", "model.heads=4", "train.precision=fp32", "sample.cfg=1", "sample.steps=2"]
    import_weights.bring([str(tmp_path / "ckpt.pth"), "--out", str(tmp_path / "made"), *digits])
    whole = load(tmp_path / "made")
    tree, tensors = encode(whole.config), dict(whole.tensors)
    tree["model"] |= {"channels": 1, "num_classes": 10}
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"][:, :1].contiguous()
    tensors["y_embedder.weight"] = torch.cat([tensors["y_embedder.weight"], torch.zeros(5, 32)])
    for part in ("weight", "bias"):
        tensors[f"final_layer.linear.{part}"] = tensors[f"final_layer.linear.{part}"][:8].contiguous()
    return write(Weights(tensors, load_tree(tree), 9, "ema", "test"), tmp_path / "one", limit=100_000)


def test_fine_tuning_starts_from_imported_weights(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["--config", str(folder / "config.yaml"), "--run", str(run), "optimizer.lr=1e-9", "train.log_every=1"]
    command += ["train.global_batch_size=8"]
    done = train(*command, f"train.init={folder}", "parallel.expert_parallel=2", "train.steps=1", processes=2)
    assert f"starting from {folder}" in done.stdout
    reader = Reader(layout.folder(run, 1))
    for name, tensor in load(folder).tensors.items():
        if not name.endswith(("router.threshold", "router.updates")):  # they moved with the step
            torch.testing.assert_close(reader(name, "ema"), tensor, rtol=0, atol=1e-6, msg=name)
    assert float(reader("blocks.1.mlp.router.updates", "ema")) == 2
    again = train(*command, "train.steps=2", f"train.init={tmp_path / 'gone'}")  # no longer needed
    assert "resuming at step 1" in again.stdout
    table = Reader(layout.folder(run, 2))("pos_embed", "ema")
    assert torch.equal(table, random_state("diffmoe")["pos_embed"])


def test_weights_that_compute_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    def start(*overrides: str) -> InitialWeights:
        return InitialWeights(load_config(str(folder / "config.yaml"), [f"train.init={folder}", *overrides]))

    table = start("moe.router.capacity_weight=1", "diffusion.name=ddpm")("pos_embed", "fp32")
    assert table is not None and table.shape == (1, 16, 32)
    for change, text in (
        ("moe.router.top_k=2", "moe.router.top_k=2: the weights in train.init=.* have moe.router.top_k=1"),
        ("model.qk_norm=true", "model.qk_norm=true: the weights in"),
        ("model.time=sigma", "model.time=sigma: the weights in"),
        ("moe=null", "moe=null: the weights in .* have moe=a section"),
        (f"train.init={tmp_path / 'no'}", "no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=text):
            start(change)
    new = tmp_path / "new"
    words = ["--config", str(folder / "config.yaml"), "--run", str(new), f"train.init={folder}", "model.qk_norm=true"]
    done = train(*words, check=False, fork=True)
    assert done.returncode == 2 and "model.qk_norm=true: the weights in" in done.stderr and not new.exists()


def tree_of_digits(folder: Path, classes: int) -> Path:
    """Two grey pictures of each class, in a folder of its own."""
    numbers = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c:02d}").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(numbers.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"class{c:02d}/{i}.png")
    return folder


def test_own_classes_from_a_run_with_others(tmp_path: Path) -> None:
    """From digits to 5 classes, on two ranks that share the experts; resumed; exported; and to 12 classes."""
    ten, five = tmp_path / "ten", tmp_path / "five"
    train("--config", "tiny", "--run", str(ten), "train.steps=2", "train.checkpoint_every=2")
    slow = ["optimizer.lr=1e-9", "optimizer.ema_decay=0", "train.init_reset=[labels]", "train.global_batch_size=8"]

    def command(run: Path, classes: int) -> list[str]:
        data = tmp_path / f"data{classes}"
        if not data.exists():
            tree_of_digits(data, classes)
        own = [f"model.num_classes={classes}", "data.name=images", f"data.path={data}", "sample.classes=5"]
        return ["--config", "tiny", "--run", str(run), *slow, *own]

    done = train(
        *command(five, 5), f"train.init={ten}", "parallel.expert_parallel=2", "train.steps=1", processes=2
    ).stdout
    assert "train.init: drawn y_embedder.weight (the null label keeps its row)" in done
    record = json.loads((five / "init.json").read_text())
    assert record["drawn"] == ["y_embedder.weight"] and record["init"] == str(layout.folder(ten, 2))
    before, after = load(ten).tensors, load(five).tensors
    config = load_config(str(five / "config.yaml"))
    rows = materialize(build(config), config.train.seed).y_embedder.weight
    for name, tensor in after.items():
        expected = torch.cat([rows[:-1], before[name][-1:]]) if name == "y_embedder.weight" else before[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)

    again = train(*command(five, 5), "train.steps=2", f"train.init={tmp_path / 'gone'}").stdout
    assert "resuming at step 1" in again and "train.init: " not in again
    assert json.loads((five / "init.json").read_text()) == record
    export.export(["--run", str(five), "--out", str(tmp_path / "out")])
    assert load(tmp_path / "out").tensors["y_embedder.weight"].shape == (6, 32)
    train(*command(tmp_path / "twelve", 12), f"train.init={tmp_path / 'out'}", "train.steps=1")
    assert load(tmp_path / "twelve").tensors["y_embedder.weight"].shape == (13, 32)


def test_a_dense_run_becomes_experts_on_two_ranks(tmp_path: Path) -> None:
    """Each rank gets its share of the copies, and a larger picture its positions."""
    dense, run = tmp_path / "dense", tmp_path / "run"
    train("--config", "tiny", "--run", str(dense), "moe=null", "train.steps=1")
    command = ["--config", "tiny", "--run", str(run), "optimizer.lr=1e-9", "optimizer.ema_decay=0", "train.steps=1"]
    command += ["data.name=images", f"data.path={tree_of_digits(tmp_path / 'data', 10)}", "model.image_size=16"]
    command += [f"train.init={dense}", "train.init_reset=[experts]", "parallel.expert_parallel=2"]
    done = train(*command, processes=2).stdout
    assert "train.init: resized pos_embed (4x4 to 8x8 tokens, computed anew)" in done
    assert "train.init: split blocks.1.mlp" in done and "train.init: drawn blocks.1.mlp.router.prototypes" in done
    before, after = load(dense).tensors, load(run).tensors
    w1, w2 = (before[f"blocks.1.mlp.fc{i}.weight"] for i in (1, 2))
    first, last = by_weight({"fc1.weight": w1, "fc2.weight": w2}).split(64)
    for name, expected in {
        "shared.0.fc1.weight": w1[first],
        "shared.0.fc2.weight": w2[:, first],
        "unconditional.0.fc1.weight": w1[last],
        "routed.experts.w1": w1[last].expand(12, 64, 32),
        "routed.experts.w2": w2[:, last].expand(12, 32, 64),
    }.items():
        torch.testing.assert_close(after[f"blocks.1.mlp.{name}"], expected, rtol=0, atol=1e-6, msg=name)
    assert after["pos_embed"].shape == (1, 64, 32)
