"""Writing a checkpoint in the official layout: {step, model_state_dict, ema_model_state_dict}, without optimizer."""

from __future__ import annotations

from pathlib import Path

import torch

from promoe_ds.config.schema import Config, reject
from promoe_ds.formats.official import State, to_official, why_not
from promoe_ds.formats.weights import Weights
from promoe_ds.utils.files import atomic


def check_layout(config: Config) -> None:
    """Raises ConfigError if the official code has no such model."""
    if text := why_not(config):
        reject("--format", "official", f"the official layout does not hold this model: {text}", "use another --format")


def official_state(weights: Weights) -> State:
    """The tensors of a model in the official layout, each with storage of its own.

    Raises:
        ConfigError: the official code has no such model.
    """
    check_layout(weights.config)
    return {name: t.clone() for name, t in to_official(weights.tensors, weights.config).items()}


def write_official(ema: Weights, raw: Weights, out: Path) -> Path:
    """Write a .pth file that the official code samples from, and that `promoe-import` reads.

    Where only one kind of weights is known, it stands for both.

    Raises:
        ConfigError: the target exists or cannot be written; the official code has no such model.
    """
    if out.exists():
        reject("--out", out, "exists; nothing is overwritten", "name another file")
    tree = {"step": ema.step, "model_state_dict": official_state(raw), "ema_model_state_dict": official_state(ema)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(out, durable=True) as temporary:
            torch.save(tree, temporary)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        reject("--out", out, f"cannot be written ({' '.join(str(error).split())[:200]})", "free space")
    return out
