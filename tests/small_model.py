"""A small model whose every parameter is drawn, and its weights as a file, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from promoe_ds.config.decode import dump
from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_tree
from promoe_ds.sampling.generate import SamplingOptions, draw_batches, pixel_batches

CPU = torch.device("cpu")
MODEL = {"depth": 2, "width": 32, "heads": 2, "patch": 2, "image_size": 8, "channels": 1, "num_classes": 10}


def tiny(diffusion: dict[str, Any] | None = None, **model: Any) -> tuple[DiT, Config]:
    """A small ProMoE whose every parameter is drawn, so that it makes more than zeros."""
    config = load_tree(
        {
            "name": "tiny",
            "model": MODEL | model,
            "moe": {"num_experts": 4},
            "diffusion": diffusion or {},
            "sample": {"steps": 3, "per_class": 2, "classes": 3},
        }
    )
    dit = materialize(build(config), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return dit.eval(), config


def draw_pixels(
    model: Callable[..., Any], config: Config, labels: np.ndarray, indices: np.ndarray, options: SamplingOptions
) -> np.ndarray:
    """All images of a model of pixels in one array, at least one: uint8 [N, H, W, C]."""
    batches = draw_batches(model, config, labels, indices, options, CPU)
    return np.concatenate([images for _, images in pixel_batches(batches, pixels=options.pixels)])


def save(file: Path, dit: DiT, config: Config, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in dit.state_dict().items()}
    save_file(tensors, file, {"format": "promoe_ds/1", "config": dump(config), "step": "7"} | (metadata or {}))
    return file
