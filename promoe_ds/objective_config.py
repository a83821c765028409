"""The options of the training objective and of guidance: the part of the configuration tree that `diffusion/` reads.

Plain data without imports of ours; `config.py` puts it into the tree and `validate.py` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Channels = Literal["all", 3]
"""which channels classifier-free guidance moves"""


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Noise prediction with a learned variance range (arXiv:2102.09672); needs `model.learn_sigma: true`."""

    num_steps: int = 1000
    """T, steps of the linear noise schedule that is trained; t is given to the model as 1000 t / T"""
    clip_denoised: bool = False
    """samplers clip the predicted image to [-1, 1]: for pixels, never for latents"""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Training objective: rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv:2403.03206) or DDPM.

    `logit_mean`, `logit_std` and `shift` are read by rectified flow alone, `ddpm` by DDPM alone.
    """

    name: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """sigma = shift*u / (1 + (shift-1)*u)"""
    label_drop: float = 0.1
    """probability that an image is trained with the null label"""
    ddpm: DDPMConfig = field(default_factory=DDPMConfig)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance while sampling."""

    channels: Channels = "all"
    """all, or 3: guide the first three channels only, as DiT and DiffMoE sample their DDPM models"""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Defaults of the sample grids drawn while training."""

    steps: int | str = 250
    """solver steps; DDPM also takes ADM's notation of respacing, such as "10,15,20" or ddim50"""
    cfg: float = 1.5
    """classifier-free guidance scale; at <= 1 one conditional forward a step"""
    per_class: int = 8
    """columns of the grid"""
    classes: int = 10
    """rows of the grid: the first classes"""
    seed: int = 0
