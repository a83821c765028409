"""The weaker model that guides in place of the null label (autoguidance, arXiv:2406.02507)."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import torch

from promoe_ds.checkpoint.load_weights import find_weights, header, load_ema
from promoe_ds.config.errors import reject, written
from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT

SAME = ("model.num_classes", "model.channels", "model.image_size", "diffusion.name")
OF_DDPM = ("model.learn_sigma", "diffusion.ddpm.num_steps")
"""what two models must share for the difference of their predictions to mean something"""


def check_weak(theirs: Config, config: Config, option: str, path: str | Path = "") -> None:
    """Raise `ConfigError`, naming `option` and the path, if a model of `theirs` cannot guide one of `config`."""
    ddpm = config.diffusion.name == "ddpm"
    for name in SAME + (OF_DDPM if ddpm else ()):
        ours, other = (attrgetter(name)(c) for c in (config, theirs))
        if ours != other:
            conflict = f"has {name}={written(other)}, the model that it is to guide has {written(ours)}"
            reject(option, path or theirs.name, conflict, "name a weaker model of the same classes and sizes")


def find_weak(path: str | Path, config: Config, option: str) -> tuple[Path, Config, int]:
    """As `load_weak`, but only its file, configuration and training step."""
    file = find_weights(Path(path), option)
    theirs, step = header(file)
    check_weak(theirs, config, option, path)
    return file, theirs, step


def load_weak(path: str | Path, config: Config, device: torch.device | str, option: str) -> tuple[DiT, Path, int]:
    """Load the model that is to guide one of `config`: the model, its file and its training step.

    Raises:
        ConfigError: as of `load_ema` and `check_weak`. `option` is what the message calls the path.
    """
    file, _, step = find_weak(path, config, option)
    return load_ema(file, device)[0], file, step
