"""Image generation from the EMA weights; needs no DeepSpeed.

Image i depends on (seed, i) alone, since its noise has a counter-based generator of its own, also the noise that a
sampler adds on the way: neither the number of processes nor the batch changes it. `job.py` fills folders with
these images.

A model of latents needs the codec that decodes them; the state of the solver stays latent.

Legend: N images of a call, B images of a batch, H W C pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Channels, Config, Interval
from promoe_ds.data.codecs import Codec
from promoe_ds.diffusion.flow_sde import SDE
from promoe_ds.diffusion.guidance import guided_prediction, guides
from promoe_ds.diffusion.objective import Solver, make_objective
from promoe_ds.sampling.noise import image_noise
from promoe_ds.utils.philox import philox
from promoe_ds.utils.pictures import IMAGE_MODES

Precision = Literal["fp32", "bf16"]
Pixels = Literal["adm", "repa"]
"""how [-1, 1] becomes a byte, truncated: 127.5 x + 128 (ADM, DiT, SiT, ProMoE, LightningDiT), or 255 (x + 1) / 2"""
DECODED_AT_ONCE = 16
"""images a codec decodes together: at 256 pixels a decoder takes more memory than the transformer"""
LABEL_COUNTER = 2
"""of random labels, in the high word of the counter (0 is the first noise, 1 that of the steps)"""


def choose_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """What is asked for, else bf16 on CUDA and fp32 elsewhere.

    In fp32 CUDA has no grouped product: torch multiplies expert by expert and waits for the device twice per MoE layer.
    """
    return ("bf16" if device.type == "cuda" else "fp32") if wanted is None else wanted


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn from weights and labels: all of it decides them, but for `batch`."""

    cfg: float
    """guidance scale; at 1 or below one labelled forward per step"""
    steps: int | str
    """of the sampler, as the objective takes them"""
    seed: int = 0
    batch: int = 64
    """images per forward (twice as many under guidance)"""
    precision: Precision = "fp32"
    """bf16 runs the model under autocast; the state of the solver stays float32"""
    sampler: str | None = None
    """euler, heun, sde; ddpm, ddim; by default the objective's first"""
    eta: float = 0.0
    """of ddim, in [0, 1]"""
    channels: Channels | None = None
    """guided channels; by default `guidance.channels` of the model's configuration"""
    interval: Interval | None = None
    """times in which guidance acts; by default `guidance.interval` of the model's configuration"""
    shift: float | None = None
    """of a flow's noise levels; by default `sample.shift` of the model's configuration, or as it was trained"""
    sde: SDE | None = None
    """of the sampler sde; None: SiT's defaults"""
    pixels: Pixels = "adm"

    def solver(self, config: Config) -> Solver:
        sampler = self.sampler or make_objective(config.diffusion).samplers[0]
        shift = config.sample.shift if self.shift is None else self.shift
        return Solver(sampler, self.steps, self.eta, shift, self.sde or SDE())

    def guided_when(self, config: Config) -> Interval:
        return config.guidance.interval if self.interval is None else self.interval


Labels = Literal["balanced", "random"]


def class_labels(num: int, num_classes: int, kind: Labels = "balanced", seed: int = 0) -> np.ndarray:
    """Labels [num] int64 of images 0, 1, ...

    Balanced: image i is of class i modulo `num_classes`. Random: drawn uniformly, for image i from (seed, i) alone.
    """
    if kind == "balanced":
        return np.arange(num, dtype=np.int64) % num_classes
    draws = (philox(seed, i, 0, LABEL_COUNTER).integers(num_classes) for i in range(num))
    return np.fromiter(draws, dtype=np.int64, count=num)


def to_pixels(x_BCHW: torch.Tensor, pixels: Pixels = "adm") -> np.ndarray:
    """[-1, 1] float [B, C, H, W] to uint8 [B, H, W, C], as `Pixels` says; REPA's is half a grey level darker.

    Raises:
        ConfigError: the model made NaN or infinity, which no pixel can show.
    """
    if not bool(torch.isfinite(x_BCHW).all()):
        reject("weights", "NaN", "the model makes values that are not finite", "name an earlier checkpoint")
    grey = 127.5 * x_BCHW.float() + 128 if pixels == "adm" else 255 * ((x_BCHW.float() + 1) / 2)
    return grey.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def pixel_shape(config: Config, codec: Codec | None = None) -> tuple[int, int, int]:
    """(H, W, C) of the pictures."""
    side = config.model.image_size * (codec.factor if codec else 1)
    return side, side, config.model.channels if codec is None else 3


def check_channels(config: Config, codec: Codec | None = None, option: str = "--vae") -> None:
    """Raises `ConfigError` if the model makes latents and no codec is named, or one of other latents is."""
    channels = config.model.channels
    if codec is not None and codec.channels != channels:
        conflict = f"{codec.kind} has latents of {codec.channels} channel(s), the model model.channels={channels}"
        raise ConfigError(f"{option}: {conflict}; name the codec that the model was trained with")
    if codec is None and (channels not in IMAGE_MODES or config.data.name == "latents"):
        way_out = f"name the codec that decodes them with {option}"
        reject("model.channels", channels, "the model makes latents, not pixels", way_out)


def draw_batches(
    model: Callable[..., Any],
    config: Config,
    labels: np.ndarray,
    indices: np.ndarray,
    options: SamplingOptions,
    device: torch.device,
    on_step: Callable[[int], object] | None = None,
    rounds: int = 0,
    weak: Callable[..., Any] | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Draw images or latents from noise, a batch at a time.

    Args:
        labels: [N] classes; `config.model.num_classes` is the null label.
        indices: [N] global image numbers, which choose the noise. An image does not depend on its batch or on the
            other images, beyond float rounding.
        on_step: called with B after every step of a batch of B.
        rounds: run at least so many batches, the excess ones in vain: ranks that share experts must run equally many.
        weak: a weaker model that guides in place of the null label; None: the null label guides.

    Yields:
        The rows of a finished batch and the final state of the solver, float32 [B, C, H, W] on `device`.
    """
    m, objective = config.model, make_objective(config.diffusion, device)
    solver, channels = options.solver(config), options.channels or config.guidance.channels
    interval = options.guided_when(config)

    def noise(index_B: np.ndarray, step: int | None = None) -> torch.Tensor:
        return image_noise(options.seed, index_B, (m.channels, m.image_size, m.image_size), step).to(device)

    @torch.no_grad()
    def draw(label_B: np.ndarray, index_B: np.ndarray, tick: Callable[[int, Any], object] | None) -> torch.Tensor:
        label = torch.from_numpy(np.asarray(label_B, dtype=np.int64))
        predict = guided_prediction(model, label, m.num_classes, options.cfg, device, channels, interval, weak)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            return objective.sample(predict, partial(noise, index_B), solver, tick)

    for start in range(0, len(indices), options.batch):
        rows = slice(start, min(start + options.batch, len(indices)))
        tick = None if on_step is None else lambda _step, state: on_step(len(state))
        yield rows, draw(labels[rows], indices[rows], tick)
    for _ in range(rounds - -(-len(indices) // options.batch)):
        draw(np.zeros(1, np.int64), np.zeros(1, np.int64), None)


def forwards_per_image(config: Config, options: SamplingOptions) -> int:
    """How often an image passes through a model: once per velocity or noise that the sampler asks for, twice where it
    is guided. Counted by drawing one grey pixel without a model."""
    count, interval = 0, options.guided_when(config)

    def predict(x_BCHW: torch.Tensor, time: float) -> torch.Tensor:
        nonlocal count
        count += 1 + guides(options.cfg, interval, time)
        return torch.zeros(1, 2, 1, 1)

    x = torch.zeros(1, 1, 1, 1)
    make_objective(config.diffusion).sample(predict, lambda step: x, options.solver(config))
    return count


def pixel_batches(
    batches: Iterator[tuple[slice, torch.Tensor]], codec: Codec | None = None, pixels: Pixels = "adm"
) -> Iterator[tuple[slice, np.ndarray]]:
    """`draw_batches`, decoded by `codec` if the model makes latents: rows of a batch and uint8 [B, H, W, C].

    Raises:
        ConfigError: the model makes NaN or infinity.
    """
    for rows, x in batches:
        x = torch.cat([codec.to_pixels(part) for part in x.split(DECODED_AT_ONCE)]) if codec else x
        yield rows, to_pixels(x, pixels)
