"""Files of weights that other code wrote: which of their dictionaries holds the model, under which prefix.

| written by | layout |
|---|---|
| ProMoE, DiffMoE | {step, model_state_dict, ema_model_state_dict} |
| DiT (ed81ce2), SiT (947f95b), REPA (67f7145) | {model, ema, opt, args}, REPA's with `steps` |
| edm2 (NVlabs/edm2, training/phema.py) | {net, ema: {stds, emas}}: one model for each width of its averaging |
| Lightning | {state_dict, global_step, ...}, names with a prefix: `denoiser.`, `ema_denoiser.` (PixelDiT) |
| anyone | a bare state dict in a .pt, .pth or .safetensors file |

Wrappers (`module.`, `_orig_mod.`, `ema_model.`) are prefixes too. Nothing is unpickled as code.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.config.errors import reject
from promoe_ds.utils.tensors import load_tensors

State = dict[str, Tensor]
Kind = Literal["ema", "raw"]
NESTED = {
    "ema": ("ema_model_state_dict", "ema", "state_dict"),
    "raw": ("model_state_dict", "model", "net", "state_dict"),
}
STEPS = ("step", "steps", "global_step")
ANCHOR = "x_embedder.proj.weight"
"""what every model of this kind has: what stands before it is the prefix"""


@dataclass(frozen=True)
class Found:
    """A model's tensors by their official names, and what the file says besides."""

    state: State
    step: int = 0
    promoe: bool = False
    """whether the file names its weights as ProMoE's code does"""
    notes: tuple[str, ...] = ()
    """what was done to the names, for people"""
    overrides: tuple[str, ...] = ()
    """`section.key=value` that the file tells beside its shapes"""
    convention: str | None = None


def counted(tensors: int) -> str:
    return "1 tensor" if tensors == 1 else f"{tensors} tensors"


def load_plain(path: Path) -> Any:
    """The tree in a file that torch or safetensors wrote; raises ConfigError, also where code would have to run."""
    if not path.is_file():
        reject("CHECKPOINT", path, "no such file", "name a .pth or .pt file, or a folder that diffusers wrote")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Namespace: DiT and SiT store their command line; it holds plain values.
        return load_tensors(path, argparse.Namespace, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # safetensors raises several kinds for a damaged file
        text, way_out = " ".join(str(error).split())[:200], getattr(error, "way_out", "get the file again")
        reject("CHECKPOINT", path, f"does not load as plain tensors ({text})", way_out)


def one_of_several(path: Path, ema: dict[str, Any], std: float | None) -> State:
    """The average of one width in edm2's {stds, emas}; raises ConfigError unless `std` or the file says which."""
    try:
        by_std = dict(zip(map(float, ema["stds"]), ema["emas"], strict=True))
        if not by_std or not all(isinstance(state, dict) for state in by_std.values()):
            raise TypeError("an average is a dictionary of tensors")
    except (ValueError, TypeError) as error:
        conflict = f"holds no averages by width ({type(error).__name__}: {error})"
        reject("CHECKPOINT", path, conflict, "get the file again")
    held = ", ".join(f"{s:g}" for s in by_std)
    if std is None and len(by_std) == 1:
        return next(iter(by_std.values()))
    if std not in by_std:
        way_out = f"add --ema-std, one of {held}"
        reject("--ema-std", "none" if std is None else std, f"{path} holds averages of widths {held}", way_out)
    return by_std[std]


def _nested(path: Path, tree: dict[Any, Any], kind: Kind, std: float | None) -> tuple[State, str | None]:
    """The dictionary of weights in a file, and its key there."""
    key = next((key for key in NESTED[kind] if isinstance(tree.get(key), dict)), None)
    if key is None and any(isinstance(tree.get(k), dict) for keys in NESTED.values() for k in keys):
        held = ", ".join(k for k in tree if isinstance(k, str))
        reject("--weights", kind, f"{path} holds none of {', '.join(NESTED[kind])} ({held})", "choose the other")
    state = tree if key is None else tree[key]
    several = key == "ema" and isinstance(state.get("emas"), list) and isinstance(state.get("stds"), list | tuple)
    if std is not None and not several:
        reject("--ema-std", std, f"{path} does not hold averages of several widths", "leave it out")
    state = one_of_several(path, state, std) if several else state
    bad = [name for name, t in state.items() if not (isinstance(name, str) and isinstance(t, Tensor))]
    if bad or not state:
        reject("CHECKPOINT", path, f"{bad[0]!r} is no tensor" if state else "is empty", "name a state dict")
    return state, key


def _stripped(
    path: Path, state: State, kind: Kind, key: str | None, dropped: Callable[[str], bool]
) -> tuple[State, list[str]]:
    """The tensors of one model without its prefix, and what was left out with the others."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # also inside: compiled blocks
    prefixes = {name.removesuffix(ANCHOR) for name in state if name.endswith(ANCHOR) and not dropped(name)}
    averaged = {prefix for prefix in prefixes if re.search(r"(?<![a-z])ema(?![a-z])", prefix)}
    choices = sorted((averaged if kind == "ema" else prefixes - averaged) if averaged else prefixes)
    if key == "state_dict" and kind == "ema" and prefixes and not averaged:
        conflict = f"{path} holds no averaged weights ({', '.join(f'{p}*' for p in sorted(prefixes))})"
        reject("--weights", kind, conflict, "choose raw")
    if len(choices) > 1 or (averaged and not choices):
        listed = ", ".join(f"{p}*" for p in sorted(prefixes))
        reject("--weights", kind, f"{path} holds several models ({listed})", "--drop those you do not mean")
    prefix = choices[0] if choices else ""
    others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    inside = [name for name in state if name.startswith(prefix) and not (others and name.startswith(others))]
    heads = sorted({name.split(".")[0] for name in state.keys() - set(inside)})
    notes = [f"read what is named {prefix}*"] if prefix else []
    if heads:
        notes.append(f"left out {counted(len(state) - len(inside))} of {', '.join(f'{h}.*' for h in heads[:5])}")
    return {name.removeprefix(prefix): state[name] for name in inside}, notes


def _renumbered(state: State) -> tuple[State, list[str]]:
    """REPA's published weights count the blocks after its projectors anew (`load_legacy_checkpoints` in its utils)."""
    if not any(name.startswith("decoder_blocks.") for name in state):
        return state, []
    first = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m), default=-1)
    later = re.compile(r"^decoder_blocks\.(\d+)\.")
    named = {later.sub(lambda m: f"blocks.{int(m[1]) + first}.", name): tensor for name, tensor in state.items()}
    return named, [f"decoder_blocks.* follow block {first - 1}"]


def read_file(path: Path, kind: Kind, dropped: Callable[[str], bool], std: float | None = None) -> Found:
    """The state dict of a file of weights.

    Args:
        kind: which, of a file that holds averaged and raw weights.
        dropped: whether a name, prefix and all, is meant to be left out: a model under it is not looked at.
        std: which average, where edm2's code kept several.

    Raises:
        ConfigError: no such file, one that would run code to load, one without such weights or with several models.
    """
    tree = load_plain(path)
    if not isinstance(tree, dict):
        reject("CHECKPOINT", path, f"holds a {type(tree).__name__}, not a state dict", "name another file")
    held, key = _nested(path, tree, kind, std)
    state, notes = _stripped(path, held, kind, key, dropped)
    state, renamed = _renumbered(state)
    steps = [tree[name] for name in STEPS if isinstance(tree.get(name), int)] if key else []
    promoe = key is not None and key.endswith("model_state_dict")
    return Found(state, steps[0] if steps else 0, promoe, (*notes, *renamed))
