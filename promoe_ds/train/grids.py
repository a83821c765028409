"""Sample grids while training: RUN/samples/grid.png, by step, and beside it which expert each token went to."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from promoe_ds.config import Config, ConfigError
from promoe_ds.models.init import build
from promoe_ds.moe.trace import LastChoice
from promoe_ds.pictures import beside, token_maps
from promoe_ds.sampling import draw_grid, grid


def keep_grid(folder: Path, weights: dict[str, Tensor], config: Config, step: int, device: torch.device) -> Image.Image:
    """Draw with these weights and fixed noise, and write the pictures of `step`; returns the one to log.

    Raises:
        GridFailed: it cannot be drawn or written; says why.
    """
    try:
        model = build(config)
        model.load_state_dict(weights, assign=True)
        with LastChoice(model.to(device).eval()) as choice:
            image = draw_grid(model, config, device, choice.keep)
        folder.mkdir(exist_ok=True)
        image.save(folder / f"grid_{step:08d}.png")
        image.save(folder / "grid.png")
        expert_BS = choice.experts_BS()
        if config.moe and expert_BS is not None:
            image = beside(image, grid(token_maps(expert_BS, config.moe.num_experts), config.sample.per_class))
            image.save(folder / "experts.png")
        return image
    except (ConfigError, OSError, torch.OutOfMemoryError) as error:
        raise GridFailed(" ".join(str(error).split())[:300]) from error


class GridFailed(Exception):
    """A picture is no reason to lose a run."""
