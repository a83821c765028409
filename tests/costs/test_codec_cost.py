from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launchers import train as launcher
from promoe_ds.config.schema import Config, DataConfig, ModelConfig
from promoe_ds.costs.codec_cost import codec_cost
from promoe_ds.data import taef2
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.coded_images import ENCODED_AT_ONCE
from promoe_ds.moe import routers as routers  # a Config holds the one of a router
from tests.data.test_codecs import write_taef2
from tests.photographs import tiny_kl


def config_of(vae: Path | str, **data: Any) -> Config:
    model = ModelConfig(image_size=8, channels=32)
    return Config(moe=None, model=model, data=DataConfig(**{"name": "images", "vae": str(vae), **data}))


def test_a_real_pass_of_taef2_does_what_is_counted(tmp_path: Path) -> None:
    flops, sizes = 0, []

    def see(conv: nn.Conv2d, _: Any, y: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * y.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        sizes.append(y.numel())

    encoder = taef2.encoder()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see)
    encoder(torch.zeros(1, 3, 64, 64))
    cost = codec_cost(config_of(write_taef2(tmp_path)))
    assert cost is not None and (cost["kind"], cost["side"]) == ("TAEF2", 64)
    assert cost["params"] == sum(p.numel() for p in encoder.parameters()) and cost["weights"] == 4 * cost["params"]
    assert cost["gflops_per_image"] == pytest.approx(flops / 1e9)
    assert cost["activations"] == 3 * max(sizes) * ENCODED_AT_ONCE * 4
    half = codec_cost(config_of(tmp_path, vae_precision="bf16"))
    assert half is not None and half["activations"] == cost["activations"] / 2


def test_only_what_encodes_is_counted(tmp_path: Path) -> None:
    cost, model = codec_cost(config_of(tiny_kl(tmp_path))), open_codec(str(tmp_path)).model
    parts = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    assert cost is not None and cost["params"] == sum(p.numel() for p in parts) and cost["side"] == 16


def test_nothing_is_counted_where_nothing_is_encoded_or_known(tmp_path: Path) -> None:
    assert codec_cost(config_of(tmp_path, name="latents")) is None and codec_cost(Config()) is None
    assert codec_cost(config_of("nowhere")) == {
        "missing": "data.vae=nowhere: no such folder; put config.json and diffusion_pytorch_model.safetensors "
        "(334,643,276 bytes, SHA-256 a1d99348...) of the public release stabilityai/sd-vae-ft-mse into a folder and "
        "name it; nothing is downloaded"
    }


def test_the_dry_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny", "--dry-run", "data.name=images", "model.channels=4"]
    assert launcher.main([*words, f"data.vae={tiny_kl(tmp_path / 'vae')}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "encoder (AutoencoderKL, frozen) " in text and "encoding 16 pixels, per image 0.0" in text
    assert "codec_weights" in text and "codec_activations" in text
    assert launcher.main([*words, "data.vae=nowhere"]) == 0
    assert "encoding not known (data.vae=nowhere: no such folder;" in " ".join(capsys.readouterr().out.split())
