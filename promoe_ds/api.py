"""The public Python API: `promoe_ds.load_model` and `promoe_ds.generate`. Needs no DeepSpeed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from promoe_ds.checkpoint.load_weights import load_ema
from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.schema import Config, Interval
from promoe_ds.diffusion.flow_sde import SDE
from promoe_ds.diffusion.objective import choose_sampler
from promoe_ds.models.dit import DiT
from promoe_ds.recipes.validate import check_interval
from promoe_ds.sampling.generate import Precision, SamplingOptions, choose_precision, draw_batches
from promoe_ds.sampling.weak import check_weak, load_weak
from promoe_ds.utils.ranks import find_device


def load_model(path: str | Path, device: torch.device | str = "cpu") -> DiT:
    """Load a model to sample from.

    Args:
        path: an exported or imported folder (`promoe-export`, `promoe-import`), a checkpoint folder, a run folder (the
            EMA of its newest checkpoint), or one of their .safetensors files.
        device: where to put it: cpu, cuda or cuda:N.

    Returns:
        The transformer: float32, `eval()`, without gradients. `model.config` is its configuration: `model.config.model`
        has channels C, image_size H = W and num_classes; images of C = 1 or 3 are pixels, others latents.
        `model(x, t, y).prediction` is made of noisy x, float [B, C, H, W]; of t, float [B] in 0..1000, where 1000 is
        noise; and of labels y, integers [B], where num_classes means "no class" (docs/formats.md).

    Raises:
        promoe_ds.ConfigError: nothing there, a damaged file, another format, tensors that do not fit the configuration,
            no such device; the message is one line. Nothing is unpickled.
    """
    if not isinstance(path, str | os.PathLike):
        reject("path", repr(path), "is no path", "name a folder or a file")
    return load_ema(path, find_device(device, "device"))[0]


def generate(
    model: DiT,
    labels: Sequence[int] | np.ndarray | Tensor,
    cfg: float | None = None,
    steps: int | str | None = None,
    seed: int = 0,
    *,
    sampler: str | None = None,
    eta: float = 0.0,
    shift: float | None = None,
    sde: SDE | None = None,
    interval: Interval | None = None,
    guidance_model: DiT | None = None,
    batch: int = 64,
    precision: Precision | None = None,
) -> Tensor:
    """Draw images, or latents, of the given classes.

    Image i depends on (seed, i) and its label alone, not on `batch`: the same as image i of `launchers/sample.py`.

    Args:
        model: of `load_model`.
        labels: N integers in 0..num_classes; num_classes means "no class".
        cfg: classifier-free guidance scale s, p = p_null + s (p_label - p_null) (arXiv:2207.12598); at 1 or below one
            conditional forward a step. None: `model.config.sample.cfg`.
        steps: of the sampler; None: `model.config.sample.steps`. DDPM also takes ADM's "10,15,20" or "ddim50".
        seed: 0 <= seed < 2**64.
        sampler: euler (default), heun or sde (arXiv:2401.08740) for rectified flow (arXiv:2209.03003); ddpm (default,
            ancestral, arXiv:2006.11239) or ddim (arXiv:2010.02502) for DDPM.
        eta: of ddim, 0 to 1.
        shift: of a flow's noise levels; None: the configuration's `sample.shift`, else as it was trained.
        sde: of the sampler sde, `promoe_ds.SDE`; None: SiT's defaults.
        interval: (lo, hi), the times in 0..1000 that are guided (arXiv:2404.07724). None: the configuration's.
        guidance_model: a weaker model of the same classes and sizes, for p_null (arXiv:2406.02507). None: that of the
            configuration, if it names one.
        batch: images a forward; twice as many under classifier-free guidance.
        precision: fp32, or bf16 autocast; None: bf16 on CUDA, fp32 elsewhere.

    Returns:
        float32 [N, C, H, W] on the model's device: pixels, in [-1, 1] up to overshoot, or the latents that the model
        was trained on (Stable Diffusion's, times 0.18215: decode x / 0.18215).

    Raises:
        promoe_ds.ConfigError: an argument of another type; a label, scale, seed, sampler, precision, interval or number
            of steps that does not exist; a guidance model of other classes or sizes.
    """
    config = _config(model, "model")
    m, label_N, device = config.model, _labels(labels, config.model.num_classes), next(model.parameters()).device
    cfg, steps = config.sample.cfg if cfg is None else cfg, config.sample.steps if steps is None else steps
    how = {"sampler": sampler, "eta": eta, "shift": shift, "sde": sde, "interval": interval}
    options = SamplingOptions(cfg, steps, seed, batch, choose_precision(precision, device), **how)
    options = _checked(options, config)
    out = torch.empty(len(label_N), m.channels, m.image_size, m.image_size, device=device)
    drawn = label_N, np.arange(len(label_N)), options, device
    for rows, x in draw_batches(model, config, *drawn, weak=_weak(model, guidance_model)):
        out[rows] = cast(Tensor, x)
    return out


def _checked(asked: SamplingOptions, config: Config) -> SamplingOptions:
    """The options of `generate`, each looked at, whatever it was given; raises ConfigError."""
    o = replace(
        asked,
        cfg=_number("cfg", asked.cfg),
        steps=int(asked.steps) if isinstance(asked.steps, np.integer) else asked.steps,
        eta=_number("eta", asked.eta),
        interval=_interval(asked.interval),
        shift=None if asked.shift is None else _number("shift", asked.shift),
        sde=_sde(asked.sde),
    )
    if not (isinstance(o.seed, int | np.integer) and 0 <= o.seed < 2**64):
        reject("seed", str(o.seed), "must lie in [0, 2**64)", "choose such a number")
    if not (isinstance(o.batch, int | np.integer) and o.batch >= 1):
        reject("batch", o.batch, "must be a positive number of images", "choose 1 or more")
    if not (math.isfinite(o.cfg) and o.cfg >= 0):
        reject("cfg", o.cfg, "is negative or not finite", "choose a guidance scale; 1 is none")
    if isinstance(o.steps, int) and o.steps < 1:
        reject("steps", o.steps, "must be positive", "choose 1 or more")
    if o.sampler is not None and not isinstance(o.sampler, str):
        reject("sampler", repr(o.sampler), "is no name of a sampler", "name one, or leave it out")
    known = get_args(Precision)
    if not (isinstance(o.precision, str) and o.precision in known):
        reject("precision", o.precision, f"must be one of {', '.join(known)}", did_you_mean(o.precision, known))
    solver, _ = choose_sampler(config, o.sampler, o.steps, o.eta, o.shift, o.sde)
    return replace(o, sampler=solver.sampler, shift=solver.shift)


def _weak(model: DiT, given: DiT | None) -> DiT | None:
    """The model that guides: the given one, else that of the configuration, on the same device; raises ConfigError."""
    config, device = model.config, next(model.parameters()).device
    if given is not None:
        check_weak(_config(given, "guidance_model"), config, "guidance_model")
        return given
    path = config.guidance.model
    return load_weak(path, config, device, "guidance.model")[0] if path else None


def _config(model: Any, name: str) -> Config:
    """The configuration of a model; raises ConfigError for what is none."""
    if not isinstance(config := getattr(model, "config", None), Config):
        reject(name, type(model).__name__, "is no model", "give one of promoe_ds.load_model")
    return config


def _number(name: str, value: Any) -> float:
    """Raises ConfigError for what is no number. Text is none, whatever it says."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor of several
        pass
    reject(name, repr(value), "is no number", "give one")


def _interval(value: Any) -> Interval | None:
    """Raises ConfigError for what is no interval of times; None is that of the configuration."""
    if value is None:
        return None
    try:
        interval = tuple(_number("interval", end) for end in value)
    except TypeError:
        reject("interval", repr(value), "is not two numbers", "give for example (100, 900)")
    check_interval(interval, "interval")
    return interval


def _sde(value: Any) -> SDE | None:
    """Raises ConfigError for what is no SDE, or one of other things than numbers."""
    if value is not None and not isinstance(value, SDE):
        reject("sde", repr(value), "is no promoe_ds.SDE", "give one, or leave it out")
    for field in ("diffusion_norm", "last_step_size") if value else ():
        _number(f"sde.{field}", getattr(value, field))
    return value


def _labels(labels: Sequence[int] | np.ndarray | Tensor, num_classes: int) -> np.ndarray:
    """int64 [N]; raises ConfigError."""
    try:
        label_N = np.asarray(torch.as_tensor(labels).cpu()).reshape(-1)
    except (ValueError, TypeError, RuntimeError):
        reject("labels", str(labels), "are no numbers", f"give integers in 0..{num_classes}")
    if bad := [label for label in label_N.tolist() if not (isinstance(label, int) and 0 <= label <= num_classes)]:
        reject("labels", bad[0], f"is not in 0..{num_classes}", f"{num_classes} means no class")
    return label_N
