"""A small vision transformer with random weights under the names of facebookresearch's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promoe_ds.evaluation import dinov2
from promoe_ds.evaluation.dinov2 import Size

SMALL = Size(32, 2, 2)


def random_state(size: Size = SMALL) -> dict[str, torch.Tensor]:
    """The tensors of facebookresearch's network, with a large enough layer scale that every block matters."""
    d, draw = size.width, torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, d), "mask_token": (1, d), "pos_embed": (1, 1 + 37 * 37, d),
              "patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,),
              "norm.weight": (d,), "norm.bias": (d,)}  # fmt: skip
    for i in range(size.depth):
        for name, shape in {"norm1": (d,), "norm2": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d),
                            "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls1.gamma": (d,), f"blocks.{i}.ls2.gamma": (d,)}
    return {name: torch.randn(shape, generator=draw) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def write_dinov2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small network as a .pth file; `dinov2.VIT_L` becomes its size."""
    monkeypatch.setattr(dinov2, "VIT_L", SMALL)
    path = folder / "dinov2.pth"
    torch.save(random_state(), path)
    return path
