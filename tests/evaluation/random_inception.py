"""Random weights and pictures that are the same on every machine: drawn by Philox, without transcendental functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from promoe_ds.evaluation.inception import InceptionV3

BATCH = 4


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Inception's 566 tensors, scaled so that features and logits are of order 1."""
    rng = np.random.Generator(np.random.Philox(seed))
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in InceptionV3().state_dict().items()}
    return {name: torch.from_numpy(np.asarray(_draw(rng, name, shape))) for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    u = rng.random(shape, np.float32) * 2 - 1
    if name.endswith("bn.weight") or name.endswith("running_var"):
        return 1 + np.float32(0.25) * u
    if len(shape) == 1:
        return np.float32(0.125) * u
    return u * np.float32(np.sqrt(6 / np.prod(shape[1:])) * (0.5 if name == "fc.weight" else 1))


def pictures(num: int, seed: int, shape: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Coloured blocks with some noise, uint8 [num, H, W, 3], of strength that varies from picture to picture."""
    rng = np.random.Generator(np.random.Philox(seed))
    blocks = rng.integers(0, 192, (num, shape[0] // 8, shape[1] // 8, 3)).repeat(8, 1).repeat(8, 2)
    noise = rng.integers(0, 64, (num, *shape, 3)) * rng.integers(0, 2, (num, 1, 1, 1))
    return (blocks + noise).astype(np.uint8)


def write_weights(folder: Path) -> Path:
    """The random weights as a .pth file."""
    path = folder / "random_inception.pth"
    torch.save(random_weights(), path)
    return path
