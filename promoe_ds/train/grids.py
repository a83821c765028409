"""Sample grids while training: RUN/samples/grid.png, by step, and beside it which expert each token went to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.data.codecs import Codec, open_codec
from promoe_ds.models.init import build
from promoe_ds.moe.observe import LastChoice
from promoe_ds.sampling.generate import Precision, SamplingOptions, check_channels, draw_batches, pixel_batches
from promoe_ds.sampling.weak import load_weak
from promoe_ds.utils.pictures import beside, grid, token_maps, write_png


class GridFailed(Exception):
    """A picture is no reason to lose a run."""


def keep_grid(
    folder: Path,
    weights: dict[str, Tensor],
    config: Config,
    step: int,
    device: torch.device,
    latents: dict[str, Any] | None = None,
) -> Image.Image:
    """Draw with these weights and fixed noise, and write the pictures of `step`; returns the one to log.

    Args:
        latents: the codec's record of what the model is trained on, if it is no pixels.

    Raises:
        GridFailed: it cannot be drawn or written; says why.
    """
    try:
        model = build(config)
        model.load_state_dict(weights, assign=True)
        with LastChoice(model.to(device).eval()) as choice:
            image = draw_grid(model, config, device, choice.keep, latents)
        folder.mkdir(exist_ok=True)
        write_png(folder / f"grid_{step:08d}.png", image)
        write_png(folder / "grid.png", image)
        if config.moe and (expert_BS := choice.experts_BS()) is not None:
            image = beside(image, grid(token_maps(expert_BS, config.moe.num_experts), config.sample.per_class))
            write_png(folder / "experts.png", image)
        return image
    except (ConfigError, OSError, torch.OutOfMemoryError) as error:
        raise GridFailed(" ".join(str(error).split())[:300]) from error


def open_decoder(config: Config, device: torch.device, latents: dict[str, Any] | None = None) -> Codec | None:
    """What turns samples into pixels: `data.vae`, with the scale and shift of the record of what is trained on.

    Raises:
        ConfigError: the model makes latents and `data.vae` names no codec of theirs.
    """
    codec = open_codec(config.data.vae, device, "data.vae") if config.data.vae else None
    check_channels(config, codec, "data.vae=DIR" if codec is None else "data.vae")
    if codec is not None and latents is not None:
        codec.follow(latents)
    return codec


def draw_grid(
    model: torch.nn.Module,
    config: Config,
    device: torch.device,
    after_batch: Callable[[int], object] = lambda count: None,
    latents: dict[str, Any] | None = None,
) -> Image.Image:
    """The grid that training shows: one row per class, `sample.per_class` columns, the same noise every time.

    Training in bf16 on a GPU draws in bf16. The model's training mode is left as it was. Latents are decoded by
    `data.vae`, with the scale and shift of their record. After each batch, `after_batch` is called with its number of
    images.

    Raises:
        ConfigError: the model makes latents and `data.vae` names no codec of theirs, or values that are not finite.
    """
    codec, s = open_decoder(config, device, latents), config.sample
    labels = np.repeat(np.arange(min(s.classes, config.model.num_classes)), s.per_class)
    precision: Precision = "bf16" if device.type == "cuda" and config.train.precision != "fp32" else "fp32"
    weak = load_weak(config.guidance.model, config, device, "guidance.model")[0] if config.guidance.model else None
    was_training = model.training
    model.eval()
    try:
        images, options = [], SamplingOptions(s.cfg, s.steps, s.seed, precision=precision)
        batches = draw_batches(model, config, labels, np.arange(len(labels)), options, device, weak=weak)
        for _, made in pixel_batches(batches, codec):
            images.append(made)
            after_batch(len(made))
    finally:
        model.train(was_training)
    return grid(np.concatenate(images), s.per_class)
