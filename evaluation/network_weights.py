"""Weight files of the networks that give features: read without pickled code, matched tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from promoe_ds.config.errors import reject
from promoe_ds.utils.tensors import load_tensors


def read_weights(path: Path, option: str, way_out: str) -> dict[str, Tensor]:
    """State dict of a .pth (no pickled code is run) or .safetensors file. Raises `ConfigError` if it is neither."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = load_tensors(path)
    except Exception as error:  # safetensors raises several kinds for a damaged file
        reject(option, path, f"cannot be read as tensors ({type(error).__name__})", way_out)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        reject(option, path, "holds no plain state dict", way_out)
    return state


def check_weights(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, option: str, way_out: str
) -> None:
    """Raises `ConfigError` if a tensor is missing, left over or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [list(side[name].shape) if name in side else None for side in (wanted, found)]
        if shapes[0] != shapes[1]:
            fault = f"tensor {name} is {shapes[1] or 'missing'}, the network has {shapes[0] or 'none'}"
            reject(option, path, fault, way_out)
