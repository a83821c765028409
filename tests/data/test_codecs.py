from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from promoe_ds.config.errors import ConfigError
from promoe_ds.data import taef2
from promoe_ds.data.codecs import TAEF2, TAEF2_FILES, WEIGHTS, check_same, find_codec, open_codec
from tests.photographs import crops, psnr, tiny_kl

PACKS = Path(os.environ.get("PROMOE_DS_DATA", Path(__file__).resolve().parents[3] / "shared/data"))


def photographs(side: int, count: int = 4) -> torch.Tensor:
    """[2 * count, 3, side, side] in [-1, 1]."""
    pictures = [np.asarray(picture) for group in crops(count, side).values() for picture in group]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_taef2(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, module in zip(TAEF2_FILES, (taef2.encoder(), taef2.decoder()), strict=True):
        torch.save({key: value.half() for key, value in module.state_dict().items()}, folder / name)
    return folder


def test_identity_changes_nothing() -> None:
    codec, x = open_codec("identity"), photographs(16)
    assert (codec.channels, codec.moments, codec.factor, codec.scale, codec.digest) == (3, 3, 1, 1.0, "")
    assert torch.equal(codec.to_pixels(codec.encode(x)), x)


def test_taef2_is_read_from_its_two_files(tmp_path: Path) -> None:
    codec = open_codec(str(write_taef2(tmp_path)))
    z = codec.encode(photographs(32))
    assert z.shape == (8, 32, 4, 4) and z.dtype == torch.float32 and codec.decode(z).shape == (8, 3, 32, 32)
    assert codec.record() == {
        "kind": "TAEF2", "channels": 32, "factor": 8, "scale": 1.0, "shift": 0.0, "stochastic": False,
        "digest": codec.digest,
    }  # fmt: skip
    assert len(codec.digest) == 32 and open_codec(str(tmp_path)).digest == codec.digest
    assert sum(p.numel() for p in taef2.encoder().parameters()) == 1_338_528  # as many as the public files hold


def test_taef2_looks_at_a_neighbourhood_and_clamps() -> None:
    """Against a slow reading of the layer list: middle blocks add their pool to the input before all else."""
    block = taef2.Block(middle=True)
    assert block.pool is not None
    x = torch.randn(1, 64, 5, 5)
    y = x + block.pool(x)
    torch.testing.assert_close(block(x), torch.relu(block.conv(y) + y))
    assert torch.allclose(taef2.Clamp()(torch.tensor([0.0, 1e4, -1e4])), torch.tensor([0.0, 3.0, -3.0]))


@pytest.mark.skipif(not (PACKS / TAEF2_FILES[0]).is_file(), reason=f"{PACKS}/{TAEF2_FILES[0]} is absent")
def test_taef2_restores_photographs() -> None:
    codec, x = open_codec(str(PACKS)), photographs(128, 3)
    with torch.inference_mode():
        z = codec.encode(x)
        exact, stored = codec.decode(z).clamp(-1, 1), codec.decode(z.half().float()).clamp(-1, 1)
    assert isinstance(codec, TAEF2) and abs(float(z.mean())) < 0.2 and 0.5 < float(z.std()) < 1.2
    assert float(psnr(x, exact).mean()) >= 28
    assert abs(float(psnr(x, exact).mean() - psnr(x, stored).mean())) < 0.01  # what fp16 storage costs


def test_a_diffusers_autoencoder(tmp_path: Path) -> None:
    codec, x = open_codec(str(tiny_kl(tmp_path))), photographs(16)
    assert (codec.kind, codec.channels, codec.moments, codec.factor, codec.scale, codec.stochastic) == (
        "AutoencoderKL", 4, 8, 2, 0.18215, True,
    )  # fmt: skip
    moments = codec.encode(x)
    assert moments.shape == (8, 8, 8, 8)
    mean = codec.model.encode(x).latent_dist.mode()  # type: ignore[attr-defined]
    torch.testing.assert_close(moments[:, :4], mean)
    torch.testing.assert_close(codec.to_pixels(mean * 0.18215), codec.decode(mean), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in codec.model.parameters())  # type: ignore[attr-defined]


def test_a_tiny_autoencoder_of_diffusers(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=5, upsampling_scaling_factor=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    codec = open_codec(str(tmp_path))
    assert (codec.channels, codec.moments, codec.factor, codec.stochastic) == (5, 5, 2, False)
    assert codec.to_pixels(codec.encode(photographs(16))).shape == (8, 3, 16, 16)


@pytest.mark.parametrize("spoil", ["absent", "empty", "no weights"])
def test_an_absent_vae_says_what_to_get(tmp_path: Path, spoil: str) -> None:
    folder = tmp_path / "vae"
    if spoil == "empty":
        folder.mkdir()
    if spoil == "no weights":
        (tiny_kl(folder) / WEIGHTS).unlink()
    with pytest.raises(ConfigError) as caught:
        find_codec(str(folder))
    message = str(caught.value)
    assert message.startswith(f"--vae={folder}: ") and "\n" not in message
    for part in ("config.json and diffusion_pytorch_model.safetensors", "stabilityai/sd-vae-ft-mse", "SHA-256 a1d99348",
                 "nothing is downloaded"):  # fmt: skip
        assert part in message


def test_codecs_that_do_not_fit(tmp_path: Path) -> None:
    def rejected(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            open_codec(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    half = write_taef2(tmp_path / "half")
    (half / TAEF2_FILES[1]).unlink()
    assert "lacks taef2_decoder.pth; copy taef2_decoder.pth of the public repository" in rejected(half)
    wrong = write_taef2(tmp_path / "wrong")
    torch.save({"0.weight": torch.zeros(1)}, wrong / TAEF2_FILES[0])
    assert "taef2_encoder.pth: is not TAEF2's state dict" in rejected(wrong)
    (wrong / TAEF2_FILES[0]).write_bytes(pickle.dumps(Path, 2))  # what only an unsafe reader would take
    assert "taef2_encoder.pth: is not TAEF2's state dict" in rejected(wrong)
    kl = tiny_kl(tmp_path / "kl")
    config = json.loads((kl / "config.json").read_text())
    (kl / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    assert "does not fit its config.json: " in rejected(kl) and "is missing and" in rejected(kl)
    (kl / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    assert "is of class UNet2DModel; name an AutoencoderKL or AutoencoderTiny" in rejected(kl)
    (kl / "config.json").write_text(json.dumps(config))
    (kl / WEIGHTS).write_bytes(b"garbage")
    assert "does not load as AutoencoderKL" in rejected(kl)


def test_latents_of_another_codec_are_noticed(tmp_path: Path) -> None:
    codec = open_codec(str(write_taef2(tmp_path)))
    check_same(codec.record(), codec, "--vae=DIR", "runs/x")
    check_same(codec.record() | {"digest": ""}, codec, "--vae=DIR", "runs/x")  # official trees name no weights
    with pytest.raises(ConfigError, match="--vae=DIR: has digest=.*the latents of runs/x were made with digest=0"):
        check_same(codec.record() | {"digest": "0"}, codec, "--vae=DIR", "runs/x")
    with pytest.raises(ConfigError, match="has scale=1.0, the latents of runs/x were made with scale=0.18215"):
        check_same(codec.record() | {"scale": 0.18215}, codec, "--vae=DIR", "runs/x")
    own = {"digest": "", "scale": [0.5] * 32, "shift": [0.1] * 32}
    check_same(codec.record() | own, codec, "--vae=DIR", "runs/x")
    check_same(codec.record() | {"kind": "", "factor": 0, "scale": 2.0}, codec, "--vae=DIR", "runs/x")
    with pytest.raises(ConfigError, match="has channels=32, the latents of runs/x were made with channels=4"):
        check_same(codec.record() | own | {"channels": 4}, codec, "--vae=DIR", "runs/x")


def test_decoding_inverts_the_scale_of_the_latents(tmp_path: Path) -> None:
    """Per channel, and of pictures in [0, 1], as edm2 has them."""
    codec = open_codec("identity")
    z = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scale, shift = [0.5, 2.0, 4.0], [0.25, 0.0, -1.0]
    x = (z - torch.tensor(shift).view(3, 1, 1)) * torch.tensor(scale).view(3, 1, 1)
    codec.follow(codec.record() | {"scale": scale, "shift": shift})
    torch.testing.assert_close(codec.to_pixels(x), z)
    codec.follow(codec.record() | {"pixel_range": [0.0, 1.0]})
    torch.testing.assert_close(codec.to_pixels(x), 2 * z - 1)
