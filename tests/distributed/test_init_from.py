"""Fine-tuning from weights alone, by the real trainer on two ranks that share the experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launchers import import_weights
from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.config.decode import encode
from promoe_ds.config.schema import ConfigError
from promoe_ds.formats.weights import Weights, load, write
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

    assert start("moe.router.capacity_weight=1", "diffusion.name=ddpm")("pos_embed", "fp32").shape == (1, 16, 32)
    for change, text in (
        ("moe.router.top_k=2", "moe.router.top_k=2: the weights in train.init=.* have moe.router.top_k=1"),
        ("model.qk_norm=true", "model.qk_norm=True: the weights in"),
        ("model.time=sigma", "model.time=sigma: the weights in"),
        ("moe=null", "moe=None: the weights in .* have moe=a section"),
        (f"train.init={tmp_path / 'no'}", "no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=text):
            start(change)
