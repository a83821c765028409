"""Codecs between pixels and latents: one small interface, always loaded from a local path, never downloaded.

| PATH of `--vae` | codec | latents |
|---|---|---|
| folder in diffusers' layout, `AutoencoderKL` | variational autoencoder | mean and log-variance of a Gaussian |
| folder in diffusers' layout, `AutoencoderTiny` | TAESD and its kin | one point |
| folder with taef2_encoder.pth and taef2_decoder.pth | TAEF2, 32 channels | one point |
| the word `identity` | none | the pixels |

Shape suffixes: B images, M channels of moments (2C where there is a posterior, else C), C of a latent, H W pixels,
h w latent cells.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from promoe_ds.config.errors import ConfigError, did_you_mean, reject
from promoe_ds.data import shards, taef2
from promoe_ds.utils.files import file_digest, read_json
from promoe_ds.utils.tensors import load_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
TAEF2_FILES = ("taef2_encoder.pth", "taef2_decoder.pth")
SD_SCALE = 0.18215
"""of Stable Diffusion's autoencoders: brings latents to unit variance (Rombach et al. 2022, arXiv:2112.10752)"""
HOW_TO_GET = (
    "put config.json and diffusion_pytorch_model.safetensors (334,643,276 bytes, SHA-256 a1d99348...) of the public "
    "release stabilityai/sd-vae-ft-mse into a folder and name it; nothing is downloaded"
)


PerChannel = float | list[float]


def per_channel(value: PerChannel) -> np.ndarray:
    """A number, or one per channel, as float32 that broadcasts over [..., C, h, w]."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


def _like(value: PerChannel, x: Tensor) -> float | Tensor:
    return value if isinstance(value, int | float) else torch.from_numpy(per_channel(value)).to(x.device)


class Codec(ABC):
    """A frozen autoencoder.

    Attributes:
        kind: AutoencoderKL, AutoencoderTiny, TAEF2 or identity.
        channels: C, of a latent.
        factor: pixels per side of a latent cell.
        scale, shift: the model is trained on (z - shift) * scale; numbers, or C of them.
        stochastic: `encode` gives mean and log-variance (M = 2C) of a Gaussian posterior, not a point (M = C).
        digest: BLAKE2b of the weight files, 32 hex digits: the same latents mean the same digest.
    """

    kind: str
    channels: int
    factor: int
    scale: PerChannel = 1.0
    shift: PerChannel = 0.0
    stochastic = False
    digest = ""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """of the pictures that were encoded; `follow` may change it"""

    @property
    def moments(self) -> int:
        """M, channels of what `encode` gives."""
        return self.channels * (2 if self.stochastic else 1)

    @property
    def encoding(self) -> list[nn.Module]:
        """What `encode` needs."""
        return []

    @abstractmethod
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """RGB float32 [B, 3, H, W] in [-1, 1] to unscaled moments float32 [B, M, h, w]."""

    @abstractmethod
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] to RGB float32 [B, 3, H, W], in [-1, 1] up to overshoot."""

    def encode_pixels(self, pixels_BHWC: Tensor, bf16: bool = False) -> Tensor:
        """RGB uint8 [B, H, W, 3] to unscaled moments float32 [B, M, h, w]; `bf16` is autocast."""
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bf16):
            return self.encode(x_BCHW.contiguous()).float()

    def to_latents(self, moments_BMhw: Tensor, gauss_BChw: Tensor | None) -> Tensor:
        """What the model sees: (z - shift) * scale of a sample of the posterior, z = mean + std * gauss, or of a point.

        Args:
            gauss_BChw: standard normal draws; not looked at where there is no posterior.
        """
        z_BChw = moments_BMhw
        if self.stochastic:
            assert gauss_BChw is not None
            mean, log_variance = moments_BMhw.chunk(2, dim=1)  # clamped as diffusers does
            z_BChw = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * gauss_BChw
        return (z_BChw - _like(self.shift, z_BChw)) * _like(self.scale, z_BChw)

    def to_pixels(self, x_BChw: Tensor) -> Tensor:
        """What the model makes, (z - shift) * scale, to RGB in [-1, 1] up to overshoot."""
        x_BCHW = self.decode(x_BChw / _like(self.scale, x_BChw) + _like(self.shift, x_BChw))
        low, high = self.pixel_range
        return x_BCHW if (low, high) == (-1, 1) else (x_BCHW - low) * (2 / (high - low)) - 1

    def follow(self, record: dict[str, Any]) -> Self:
        """Decode what a model makes of the latents of `record`: its scale, shift and range of pixels count."""
        self.scale, self.shift = record["scale"], record["shift"]
        self.pixel_range = tuple(record.get("pixel_range", (-1.0, 1.0)))
        return self

    def record(self) -> dict[str, Any]:
        """What an index or a run folder says of the codec."""
        return {key: getattr(self, key) for key in shards.CODEC}


class Identity(Codec):
    """Pixels are their own latents."""

    kind, channels, factor = "identity", 3, 1

    def encode(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def decode(self, z_BChw: Tensor) -> Tensor:
        return z_BChw


class TAEF2(Codec):
    """The tiny autoencoder of `taef2.py`, in float32. Raises `ConfigError` for files that do not fit."""

    kind, channels, factor = "TAEF2", taef2.LATENT, 8

    def __init__(self, folder: Path, device: torch.device, option: str):
        parts, files = (taef2.encoder(), taef2.decoder()), [folder / name for name in TAEF2_FILES]
        for file, module in zip(files, parts, strict=True):
            try:
                module.load_state_dict(load_tensors(file), strict=True)
            except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
                conflict = f"is not TAEF2's state dict ({str(error)[:200]})"
                reject(option, file, conflict, "copy it from madebyollin/taesd again")
        self.encoder, self.decoder = (_frozen(module, device) for module in parts)
        self.digest = _digest(*files)

    @property
    def encoding(self) -> list[nn.Module]:
        return [self.encoder]

    def encode(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder(x_BCHW * 0.5 + 0.5)

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.decoder(z_BChw).mul(2).sub(1)


class Diffusers(Codec):
    """An `AutoencoderKL` or `AutoencoderTiny` of diffusers, in float32. Raises `ConfigError` for files that do not fit.

    Args:
        kind: which of the two.
    """

    def __init__(self, folder: Path, kind: str, device: torch.device, option: str):
        import diffusers  # late: its import takes seconds

        again = f"copy config.json and {WEIGHTS} again"
        try:
            model, report = getattr(diffusers, kind).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            reject(option, folder, f"does not load as {kind} ({str(error)[:200]})", again)
        wrong = [f"{name} is {what}" for what in ("missing", "unexpected") for name in sorted(report[f"{what}_keys"])]
        wrong += [f"{key} has another shape" for key in report["mismatched_keys"]]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            reject(option, folder / WEIGHTS, f"does not fit its config.json: {wrong[0]}{more}", "copy both again")
        self.kind, self.stochastic = kind, kind == "AutoencoderKL"
        self.model: Any = _frozen(model, device)
        self.channels = model.config.latent_channels
        widths = model.config.block_out_channels if self.stochastic else model.config.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        self.scale = float(model.config.scaling_factor or 1.0)
        self.shift = float(getattr(model.config, "shift_factor", None) or 0.0)
        self.digest = _digest(folder / WEIGHTS)

    @property
    def encoding(self) -> list[nn.Module]:
        parts = (self.model.encoder, getattr(self.model, "quant_conv", None))
        return [part for part in parts if part is not None]

    def encode(self, x_BCHW: Tensor) -> Tensor:
        encoded = self.model.encode(x_BCHW)
        return encoded.latent_dist.parameters if self.stochastic else encoded.latents

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.model.decode(z_BChw).sample


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.float().to(device).eval().requires_grad_(False)


def find_codec(path: str, option: str = "--vae") -> str:
    """The kind of codec at a local path, judged by its files; nothing is loaded.

    Args:
        option: what messages call the path.

    Raises:
        ConfigError: files are absent; the message says which, of which public release, and where to put them.
    """
    if path == Identity.kind:
        return path
    folder = Path(path).expanduser()
    if not folder.is_dir():
        reject(option, path, "no such folder", did_you_mean(path, [Identity.kind], HOW_TO_GET))
    if any((folder / name).exists() for name in TAEF2_FILES):
        for name in TAEF2_FILES:
            if not (folder / name).is_file():
                way_out = f"copy {name} of the public repository madebyollin/taesd there; nothing is downloaded"
                reject(option, path, f"lacks {name}", way_out)
        return TAEF2.kind
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            reject(option, path, f"has no {name}", HOW_TO_GET)
    try:
        kind = read_json(folder / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        reject(option, folder / "config.json", f"cannot be read ({error})", "copy it again")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        reject(option, path, f"is of class {kind}", "name an AutoencoderKL or AutoencoderTiny")
    return kind


def open_codec(path: str, device: torch.device | str = "cpu", option: str = "--vae") -> Codec:
    """The codec at a local path, or `identity`, on `device`.

    Raises:
        ConfigError: as `find_codec`, or files that do not fit.
    """
    kind, folder, device = find_codec(path, option), Path(path).expanduser(), torch.device(device)
    if kind == Identity.kind:
        return Identity()
    return TAEF2(folder, device, option) if kind == TAEF2.kind else Diffusers(folder, kind, device, option)


def _digest(*files: Path) -> str:
    return file_digest(*files, state=hashlib.blake2b(digest_size=16))


def check_same(found: dict[str, Any], codec: Codec, option: str, where: str) -> None:
    """Raise `ConfigError` if the latents at `where` (a codec's record) were made by other weights or another scale.

    What a cache does not say of its codec ("" or 0) is not compared, and neither are a scale and shift per channel, or
    those of latents whose codec is not named: they are the data set's own, which the codec does not know.
    """
    mine, keys = codec.record(), ["kind", "channels", "factor", "digest"]
    if found["kind"] and not isinstance(found["scale"], list):
        keys += ["scale", "shift"]
    for key in keys:
        old = found[key]
        if old != mine[key] and (old or key == "shift"):
            conflict = f"has {key}={mine[key]}, the latents of {where} were made with {key}={old}"
            raise ConfigError(f"{option}: {conflict}; name the codec they were made with")
