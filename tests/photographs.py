"""Real photographs that ship with scikit-learn, and small codecs with random weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images


def crops(count: int, side: int) -> dict[str, list[Image.Image]]:
    """`count` square crops of each of two photographs, spread over them."""
    images: Any = load_sample_images().images
    out: dict[str, list[Image.Image]] = {}
    for name, pixels in zip(("china", "flower"), images, strict=True):
        height, width, _ = pixels.shape
        rows = np.linspace(0, height - side, count).astype(int)
        columns = np.random.default_rng(0).permutation(np.linspace(0, width - side, count).astype(int))
        out[name] = [Image.fromarray(pixels[r : r + side, c : c + side]) for r, c in zip(rows, columns, strict=True)]
    return out


def write_tree(root: Path, count: int, side: int) -> Path:
    """A class-per-folder tree of the crops, as JPEG."""
    for name, pictures in crops(count, side).items():
        (root / name).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            picture.save(root / name / f"{number:03d}.jpg", quality=95)
    return root


def tiny_kl(folder: Path) -> Path:
    """An AutoencoderKL of 1/2 the side, 4 channels, random weights, in diffusers' layout."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dB of each image of two batches in [-1, 1]."""
    return -10 * torch.log10((((x - y) / 2) ** 2).mean((1, 2, 3)))
