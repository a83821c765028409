"""What training draws of its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from promoe_ds.config.schema import DataConfig, GuidanceConfig
from promoe_ds.data.codecs import open_codec
from promoe_ds.sampling.generate import SamplingOptions, draw_batches, to_pixels
from promoe_ds.train.grids import draw_grid
from promoe_ds.utils.pictures import grid
from tests.photographs import tiny_kl
from tests.small_model import CPU, draw_pixels, save, tiny


def test_training_grid_has_a_row_a_class_and_keeps_the_mode() -> None:
    dit, config = tiny()
    dit.train()
    sheet = draw_grid(dit, config, CPU)
    assert isinstance(sheet, Image.Image) and sheet.size == (2 * 50 + 2, 3 * 50 + 2) and dit.training
    labels = np.repeat(np.arange(3), 2)
    options = SamplingOptions(config.sample.cfg, 3, config.sample.seed)
    images = draw_pixels(dit.eval(), config, labels, np.arange(6), options)
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(grid(images, 2)))


def test_grids_are_drawn_as_the_configuration_guides(tmp_path: Path) -> None:
    """By a weaker model, within an interval, with a shift of its own."""
    dit, config = tiny()
    weak, theirs = tiny(width=16)
    guidance = GuidanceConfig(interval=(300.0, 1000.0), model=str(save(tmp_path / "weak.safetensors", weak, theirs)))
    config = replace(config, guidance=guidance, sample=replace(config.sample, shift=2.0, cfg=3.0))
    sheet = draw_grid(dit, config, CPU)
    labels = np.repeat(np.arange(3), 2)
    options = SamplingOptions(3.0, 3, config.sample.seed, interval=(300.0, 1000.0), shift=2.0)
    ((_, x),) = draw_batches(dit, tiny()[1], labels, np.arange(6), options, CPU, weak=weak)
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(grid(to_pixels(x), 2)))


def test_grids_of_latents_are_decoded_with_their_own_scale(tmp_path: Path) -> None:
    dit, config = tiny(channels=4)
    vae = str(tiny_kl(tmp_path))
    config = replace(config, data=DataConfig(name="latents", path="x", vae=vae))
    record = open_codec(vae).record() | {"scale": [0.5, 0.4, 0.3, 0.2], "shift": [0.1, 0.0, -0.3, 0.2]}
    sheet = draw_grid(dit, config, CPU, latents=record)
    labels, options = np.repeat(np.arange(3), 2), SamplingOptions(config.sample.cfg, 3, config.sample.seed)
    ((_, x),) = draw_batches(dit, config, labels, np.arange(6), options, CPU)
    scale, shift = (torch.tensor(record[key]).view(-1, 1, 1) for key in ("scale", "shift"))
    with torch.no_grad():
        expected = to_pixels(open_codec(vae).decode(x / scale + shift))
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(grid(expected, 2)))
