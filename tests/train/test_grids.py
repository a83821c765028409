"""What training draws of its weights."""

from __future__ import annotations

import numpy as np
from PIL import Image

from promoe_ds.sampling.generate import SamplingOptions, draw_pixels
from promoe_ds.train.grids import draw_grid
from promoe_ds.utils.pictures import grid
from tests.sampling.test_generate import CPU, tiny


def test_training_grid_has_a_row_a_class_and_keeps_the_mode() -> None:
    dit, config = tiny()
    dit.train()
    sheet = draw_grid(dit, config, CPU)
    assert isinstance(sheet, Image.Image) and sheet.size == (2 * 50 + 2, 3 * 50 + 2) and dit.training
    labels = np.repeat(np.arange(3), 2)
    options = SamplingOptions(config.sample.cfg, 3, config.sample.seed)
    images = draw_pixels(dit.eval(), config, labels, np.arange(6), options, CPU)
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(grid(images, 2)))
