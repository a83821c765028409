"""The transformer as a diffusers model. Only exported folders use it, as part of a bundle (`bundle.py`)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from promoe_ds.config.schema import Config, ModelConfig, MoEConfig
from promoe_ds.models.dit import DiT
from promoe_ds.moe.router import ROUTERS


def plain_config(model: dict[str, Any], moe: dict[str, Any] | None) -> Config:
    """The sections of a configuration that decide what a model computes; they were checked when they were written."""
    if moe is None:
        return Config(model=ModelConfig(**model), moe=None)
    router = ROUTERS[moe["router"]["name"]].Config(**moe["router"])
    layers = moe["layers"] if isinstance(moe["layers"], str) else tuple(moe["layers"])
    return Config(model=ModelConfig(**model), moe=MoEConfig(**{**moe, "router": router, "layers": layers}))


class ProMoETransformer2DModel(ModelMixin, ConfigMixin):
    """A ProMoE, TC-DiT, EC-DiT, DiffMoE or dense diffusion transformer.

    Args:
        model: the section `model` of a promoe_ds configuration.
        moe: its section `moe`; None for a dense model.
        guidance_channels: "all" or 3, the channels that classifier-free guidance moves.
        guidance_interval: (lo, hi), the times in 0..1000 in which it acts.
        ddpm_steps: T of the DDPM noise schedule; None for rectified flow.
    """

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        moe: dict[str, Any] | None,
        guidance_channels: Any = "all",
        guidance_interval: Any = (0.0, 1000.0),
        ddpm_steps: int | None = None,
    ):
        super().__init__()
        self.dit = DiT(plain_config(model, moe))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict from noisy latents or pixels.

        Args:
            sample: float [B, C, H, W].
            timestep: float [B] in 0..1000; 1000 is noise.
            class_labels: int64 [B], best on the CPU; num_classes means "no class".

        Returns:
            [B, C or 2C, H, W]: velocity noise - data, or predicted noise and variance channels.
        """
        dtype = next(self.dit.x_embedder.parameters()).dtype
        with torch.no_grad():
            return self.dit.eval()(sample.to(dtype), timestep.float(), class_labels).prediction.to(sample.dtype)
