"""Small caches in the layouts of other projects, and how tests open them or are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks.image_layouts import write_files
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import DataConfig
from promoe_ds.data.caches import open_latents
from promoe_ds.data.latents import Latents

LABELS = [0, 0, 1, 2, 2, 1, 0]


def normal(item: int, channels: int = 4, side: int = 4) -> np.ndarray:
    return np.random.default_rng(item).standard_normal((channels, side, side)).astype(np.float32)


def posterior(item: int, mean: Any = 0, std: Any = 1) -> np.ndarray:
    """float32 [8, 4, 4]: mean and standard deviation."""
    scaled = normal(item) * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    return np.concatenate([scaled, abs(normal(item + 99)) * 0.1]).astype(np.float32)


def write_tree(root: Path, channels: int = 4, suffix: str = ".JPEG.npz") -> Path:
    for item, label in enumerate(LABELS):
        path = root / f"n0{label}" / f"n0{label}_{item}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=normal(item, 2 * channels), moments_flip=normal(item + 50, 2 * channels))
    return root


def write_lightningdit(root: Path, channels: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for rank in (0, 1):  # items by turns, so the order of the files is not that of the items
        items = range(rank, len(LABELS), 2)
        latents, flipped = (np.stack([normal(i + more, channels) for i in items]) for more in (0, 50))
        labels = np.array([LABELS[i] for i in items], np.int64)
        tensors = {"latents": latents, "latents_flip": flipped, "labels": labels}
        save_file(tensors, root / f"latents_rank{rank:02d}_shard000.safetensors")
    shape = 1, channels, 1, 1
    stats = {"mean": torch.arange(channels).view(shape) / 8, "std": torch.arange(1, channels + 1).view(shape) / 4}
    torch.save(stats, root / "latents_stats.pt")
    return root


def write_mean_std(path: Path, mean: Any = 0, std: Any = 1) -> Path:
    """A folder, or a zip where the path ends so."""
    names = [f"{i // 4:05d}/img-mean-std-{i:08d}.npy" for i in range(len(LABELS))]
    files: dict[str, bytes] = {}
    for item, name in enumerate(names):
        np.save(buffer := io.BytesIO(), posterior(item, mean, std))
        files[name] = buffer.getvalue()
    labels = [[name, label] for name, label in zip(names, LABELS, strict=True)]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return write_files(path, files)


def write_fast_dit(root: Path, count: int = 12) -> Path:
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True, exist_ok=True)
    for item in range(count):
        np.save(root / f"imagenet256_features/{item}.npy", normal(item)[None])
        np.save(root / f"imagenet256_labels/{item}.npy", np.array([LABELS[item % len(LABELS)]], np.int64))
    return root


def drawn(data: Latents, flip: bool = False, noise: float = 0.0) -> tuple[np.ndarray, list[int]]:
    """x of all items with every draw of the posterior equal to `noise`, and their labels."""
    gauss: Callable[..., np.ndarray] = lambda shape: np.full((len(data), *shape), noise, np.float32)  # noqa: E731
    x, label = data.draw(np.arange(len(data)), np.full(len(data), flip), gauss)
    return x.numpy(), label.tolist()


def told(path: Path, format: Any = None, num_classes: int | None = None, **more: Any) -> str:
    """The one line that refuses it."""
    with pytest.raises(ConfigError) as caught:
        data = open_latents(path, DataConfig(format=format, **more), num_classes)
        drawn(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)
