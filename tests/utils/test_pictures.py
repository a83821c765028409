"""Colours mean what the docstrings say."""

from __future__ import annotations

import numpy as np
from PIL import Image

from promoe_ds.utils.pictures import DEAD, NOBODY, beside, expert_colours, grid, load_map, token_maps


def test_expert_colours_differ() -> None:
    for experts in (1, 2, 12, 64):
        assert len({tuple(c) for c in expert_colours(experts)}) == experts


def test_load_map() -> None:
    image = load_map(np.array([[4, 4, 4, 4], [16, 0, 0, 0]]), cell=2)
    assert image.size == (8, 4)
    assert image.getpixel((0, 0)) == image.getpixel((7, 1)) != image.getpixel((0, 2))
    assert image.getpixel((3, 3)) == DEAD


def test_token_maps() -> None:
    maps = token_maps(np.array([[0, 1, 2, -1]]), 3)
    assert maps.shape == (1, 2, 2, 3) and tuple(maps[0, 1, 1]) == NOBODY
    assert (maps[0].reshape(4, 3)[:3] == expert_colours(3)).all()


def test_beside() -> None:
    both = beside(Image.new("L", (10, 20)), Image.new("RGB", (30, 10), "red"), gap=4)
    assert both.size == (10 + 4 + 60, 20) and both.getpixel((73, 19)) == (255, 0, 0)


def test_grid_keeps_order_and_sharp_pixels() -> None:
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1) * 10
    sheet = np.asarray(grid(images, columns=3, scale=4))
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2)
    cell = sheet[12:20, 12:20]  # second row, second column: image 4
    np.testing.assert_array_equal(cell, images[4, :, :, 0].repeat(4, 0).repeat(4, 1))
    assert (sheet[12:20, 22:30] == 255).all()  # no sixth image
    assert grid(np.zeros((1, 8, 8, 3), np.uint8), 1).size == (52, 52)
    assert grid(np.zeros((1, 64, 64, 3), np.uint8), 1).mode == "RGB"
