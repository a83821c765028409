"""Sheets of images and small pictures of experts, without a plotting library: cheap enough to draw while training.

Legend: L MoE layers, E routed experts, B images, S tokens per image (row-major, a square).
"""

from __future__ import annotations

import colorsys
import math
from pathlib import Path

import numpy as np
from PIL import Image

from promoe_ds.utils.files import atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""of the pictures that are read"""
IMAGE_MODES = {1: "L", 3: "RGB"}
"""channels -> Pillow mode; models of other channel counts make latents, which are not pixels"""
NOBODY = (255, 255, 255)
"""colour of a token that no expert takes"""
DEAD = (214, 39, 40)
"""colour of an expert without a token in a heat map of loads"""
LONGEST = 16
"""sides of a picture are to each other as 1 to 16 at most; what is longer is cut at the ends before it is scaled"""
RAMP = ((0.0, (247, 251, 255)), (1.0, (107, 174, 214)), (2.0, (8, 81, 156)), (4.0, (8, 20, 60)))
"""load over mean -> colour, linear in between"""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the central square, as in ADM.

    Halving with a box filter while at least twice too large, then one bicubic step: a single bicubic step from far
    above would alias. An image that is already size x size comes back unchanged. Unlike ADM, ends of what is longer
    than LONGEST times its shorter side are cut off first: the square does not show them.
    """
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:  # 1x10000 would fill the memory on its way to the central square
        left, top = (max(0, side - longest) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    shorter = min(image.size)
    if shorter != size:
        width, height = (round(side * size / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if image.size == (size, size):
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_image(pixels_HWC: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] to a picture."""
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def write_png(path: Path, image: Image.Image) -> None:
    """Whole or not there."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def grid(images_NHWC: np.ndarray, columns: int, scale: int | None = None) -> Image.Image:
    """Rows of `columns` pictures on white, in the order given.

    Args:
        images_NHWC: uint8, C 1 or 3.
        scale: each pixel becomes a square of this side (no smoothing); by default pictures reach at least 48 pixels.
    """
    _, height, width, channels = images_NHWC.shape
    scale = scale or max(1, -(-48 // min(height, width)))
    cell, gap = (width * scale, height * scale), 2
    rows = -(-len(images_NHWC) // columns)
    size = (columns * (cell[0] + gap) + gap, rows * (cell[1] + gap) + gap)
    sheet = Image.new(IMAGE_MODES[channels], size, "white")
    for i, pixels in enumerate(images_NHWC):
        picture = to_image(pixels).resize(cell, Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + i % columns * (cell[0] + gap), gap + i // columns * (cell[1] + gap)))
    return sheet


def expert_colours(num_experts: int) -> np.ndarray:
    """uint8 [E, 3]: hues around the circle, dark and light in turn so that neighbours differ."""
    tones = ((0.75, 0.85), (0.55, 0.60), (0.40, 0.95))
    colours = [colorsys.hsv_to_rgb(e / num_experts, *tones[e % len(tones)]) for e in range(num_experts)]
    return (255 * np.array(colours)).round().astype(np.uint8)


def load_map(tokens_per_expert_LE: np.ndarray, cell: int = 16) -> Image.Image:
    """Layers downwards, experts to the right: white is idle, blue the mean, dark four times the mean, red nobody."""
    tokens_per_expert_LE = np.asarray(tokens_per_expert_LE, dtype=np.float64)
    ratio_LE = tokens_per_expert_LE / np.maximum(tokens_per_expert_LE.mean(1, keepdims=True), 1e-12)
    stops, colours = [x for x, _ in RAMP], np.array([c for _, c in RAMP], dtype=np.float64)
    rgb = np.stack([np.interp(ratio_LE, stops, colours[:, i]) for i in range(3)], axis=-1)
    rgb[tokens_per_expert_LE == 0] = DEAD
    return Image.fromarray(rgb.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1))


def token_maps(expert_BS: np.ndarray, num_experts: int) -> np.ndarray:
    """uint8 [B, side, side, 3]: one pixel per token, coloured by its expert (-1: white)."""
    B, S = expert_BS.shape
    palette = np.concatenate([expert_colours(num_experts), [NOBODY]]).astype(np.uint8)
    return palette[expert_BS].reshape(B, math.isqrt(S), -1, 3)


def beside(left: Image.Image, right: Image.Image, gap: int = 12) -> Image.Image:
    """Two pictures side by side on white, the right one as high as the left."""
    right = right.convert("RGB").resize(
        (right.width * left.height // right.height, left.height), Image.Resampling.NEAREST
    )
    sheet = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    sheet.paste(left.convert("RGB"), (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet
