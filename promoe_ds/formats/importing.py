"""Reading a published checkpoint: which model it is, whether every key is accounted for, and its weights as ours.

Read: `ckpt_step_N.pth` of the official ProMoE code (model_state_dict, ema_model_state_dict), training checkpoints of
DiT, SiT and REPA (model, ema), and bare state dicts, such as DiT-XL-2-256x256.pt. Files load without running code.
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.config.schema import Config, reject
from promoe_ds.formats.card import BASE
from promoe_ds.formats.official import CONVENTIONS, FAMILIES, State, from_official, problems, to_official, why_not
from promoe_ds.formats.weights import Source, Weights
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_config

NESTED = {"ema": ("ema_model_state_dict", "ema"), "raw": ("model_state_dict", "model")}
SIZES = {(12, 384): "s", (12, 768): "b", (24, 1024): "l", (28, 1152): "xl"}
HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16}
"""width -> attention heads of the published sizes: weights do not tell"""
SHOWN = 6
NAME_ONE = "name a checkpoint of a diffusion transformer"


def read_checkpoint(path: Path, source: Source) -> tuple[State, int, bool]:
    """The state dict of a .pth or .pt file.

    Returns:
        (tensors by their official names, the training step or 0, whether the file names its weights as ProMoE does).

    Raises:
        ConfigError: no such file, one that would run code to load, or one without such weights.
    """
    if not path.is_file():
        reject("CHECKPOINT", path, "no such file", "name a .pth or .pt file")
    try:
        # Namespace: DiT and SiT store their command line; it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        text = " ".join(str(error).split())[:200]
        reject("CHECKPOINT", path, f"does not load as plain tensors ({text})", "get the file again")
    if not isinstance(tree, dict):
        reject("CHECKPOINT", path, f"holds a {type(tree).__name__}, not a state dict", "name another file")
    key = next((key for key in NESTED[source] if isinstance(tree.get(key), dict)), None)
    if key is None and any(isinstance(tree.get(k), dict) for k in (*NESTED["ema"], *NESTED["raw"])):
        held = ", ".join(k for k in tree if isinstance(k, str))
        reject("--weights", source, f"{path} holds none of {', '.join(NESTED[source])} ({held})", "choose the other")
    state = tree if key is None else tree[key]
    bad = [name for name, t in state.items() if not (isinstance(name, str) and isinstance(t, Tensor))]
    if bad or not state:
        reject("CHECKPOINT", path, f"{bad[0]!r} is no tensor" if state else "is empty", "name a state dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    step = tree.get("step") if key else None  # DiT's, SiT's and REPA's own files have none or another name
    return state, step if isinstance(step, int) else 0, key is not None and key.endswith("state_dict")


def _need(state: State, name: str, dims: int, path: Path) -> torch.Size:
    """The shape of a tensor that sizes are read from."""
    tensor = state.get(name)
    if tensor is None or tensor.ndim != dims:
        got = "is missing" if tensor is None else f"has shape {list(tensor.shape)}, expected {dims} dimensions"
        reject("CHECKPOINT", path, f"{name} {got}", NAME_ONE)
    return tensor.shape


def _numbers(state: State, pattern: str) -> set[int]:
    """What the group of a pattern matches in the names."""
    return {int(m[1]) for m in (re.match(pattern, name) for name in state) if m}


def family_of(state: State) -> str:
    """One of `FAMILIES`, by the keys of the first MoE layer. ProMoE-EC has those of ProMoE, and is never guessed."""
    names = {name.split(".", 3)[3] for name in state if re.match(r"blocks\.\d+\.mlp\.", name)}
    if not any(name.startswith("experts.") for name in names):
        return "dense"
    if "cluster_centers" in names:
        return "promoe"
    if "gate.weight" in names:
        return "token_choice"
    return "diffmoe" if any(name.startswith("capacity_predictor.") for name in names) else "expert_choice"


def _model_overrides(state: State, path: Path) -> list[str]:
    """The sizes that the shapes tell."""
    width, channels, patch, _ = _need(state, "x_embedder.proj.weight", 4, path)
    tokens = _need(state, "pos_embed", 3, path)[1]
    outputs = _need(state, "final_layer.linear.bias", 1, path)[0]
    table = _need(state, "y_embedder.embedding_table.weight", 2, path)[0]
    depth = 1 + max(_numbers(state, r"blocks\.(\d+)\."), default=-1)
    side = math.isqrt(tokens)
    if side * side != tokens or depth == 0:
        what = f"pos_embed has {tokens} tokens, no square" if depth else "it has no blocks"
        reject("CHECKPOINT", path, what, NAME_ONE)
    head = state.get("blocks.0.attn.q_norm.weight")
    if head is not None and not head.numel():
        reject("CHECKPOINT", path, "blocks.0.attn.q_norm.weight is empty", NAME_ONE)
    heads = width // head.numel() if head is not None else HEADS.get(width, 0)
    values = {"depth": depth, "width": width, "patch": patch, "image_size": side * patch, "channels": channels}
    values |= {"num_classes": table - 1, "qk_norm": str(head is not None).lower(), "heads": heads}
    values["learn_sigma"] = str(outputs == 2 * channels * patch**2).lower()
    return [f"model.{key}={value}" for key, value in values.items()]


def _moe_overrides(state: State, family: str, path: Path) -> list[str]:
    """The experts that the names and shapes tell."""
    if family == "dense":
        return ["moe=null"]
    owned = _numbers(state, r"blocks\.(\d+)\.mlp\.experts\.")
    layer = f"blocks.{min(owned)}.mlp"
    experts = 1 + max(_numbers(state, rf"{re.escape(layer)}\.experts\.(\d+)\."))
    prototypes = family.startswith("promoe")
    hidden, width = _need(state, f"{layer}.experts.0.{'up_proj' if prototypes else 'fc1'}.weight", 2, path)
    every_other = owned == set(range(1, 1 + max(_numbers(state, r"blocks\.(\d+)\.")), 2))
    values: dict[str, object] = {
        "layers": "every_other" if every_other else sorted(owned),
        "num_experts": experts - prototypes,
        "num_shared": int(prototypes),
        "num_unconditional": int(prototypes),
        "conditional": str(prototypes).lower(),
        "hidden_ratio": hidden / width,
        "router": f"{{name: {family}}}",
    }
    if family == "diffmoe" and (decay := state.get(f"{layer}.ema_decay")) is not None and decay.numel() == 1:
        values["router.threshold_decay"] = round(float(decay), 6)
    return [f"moe.{key}={value}" for key, value in values.items()]


def describe(state: State, path: Path, family: str | None, convention: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a checkpoint: its sizes from the shapes, the rest from the recipe `imagenet256`.

    Args:
        family: one of `FAMILIES`; None: as the keys say.
        convention: one of `CONVENTIONS`.
        overrides: `section.key=value`, for what weights do not tell.

    Raises:
        ConfigError: not a transformer of this kind; the family contradicts the keys; heads that must be named.
    """
    seen = family_of(state)
    if family is not None and seen != ("promoe" if family == "promoe_ec" else family):
        reject("--family", family, f"the keys of {path} are those of {seen}", f"leave it out, or --family {seen}")
    family, how = family or seen, CONVENTIONS[convention]
    sizes = _model_overrides(state, path)
    if family == "diffmoe" and how.time != "t" and "model.width=384" in sizes and "model.qk_norm=false" in sizes:
        sizes.append("model.heads=0")  # DiffMoE's own S has 16 heads, ProMoE's port of it 6: never guessed
    if "model.heads=0" in sizes and not any(text.startswith("model.heads=") for text in overrides):
        reject("model.heads", "unknown", "the weights do not tell the number of heads", "add model.heads=N")
    read = dict(text.split("=", 1) for text in sizes)
    size = SIZES.get((int(read["model.depth"]), int(read["model.width"])), read["model.width"])
    chosen = [f"name=imported_{family}_{size}", *sizes, *_moe_overrides(state, family, path)]
    chosen += [f"diffusion.name={how.objective}", f"diffusion.timesteps={how.timesteps}"]
    chosen += [f"model.time={how.time}", f"guidance.channels={how.guided}"]
    return load_config(BASE, [*chosen, *overrides])


def convert(state: State, config: Config, path: Path) -> State:
    """A checkpoint's tensors as our state dict, float32; every key is accounted for.

    Raises:
        ConfigError: keys that are missing, unexpected or of another shape, by name; a model the layout has not.
    """
    if text := why_not(config):
        reject("CHECKPOINT", path, f"the official layout does not hold this model: {text}", "change the overrides")
    expected = to_official(dict(build(config).state_dict()), config)
    if lines := problems(state, expected):
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        size = f"{config.name}, {len(expected)} keys expected, {len(state)} found"
        reject("CHECKPOINT", path, f"{'; '.join(lines[:SHOWN])}{more} ({size})", "name a checkpoint of this model")
    made = from_official({name: tensor.float() for name, tensor in state.items()}, config)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def import_checkpoint(
    path: Path,
    source: Source = "ema",
    family: str | None = None,
    convention: str | None = None,
    overrides: Sequence[str] = (),
) -> Weights:
    """Read a published checkpoint; arguments as of `describe` and `read_checkpoint`.

    Without a convention, a file that names its weights as ProMoE's code does is of ProMoE's; others do not tell.
    """
    if family is not None and family not in FAMILIES:
        reject("--family", family, "is unknown", f"choose {', '.join(FAMILIES)}")
    state, step, named = read_checkpoint(path, source)
    if convention is None:
        if not named:
            choices = "; ".join(f"{name} ({how.who})" for name, how in CONVENTIONS.items())
            reject("--convention", "none", f"{path} does not say how it was trained", f"choose one: {choices}")
        convention = "promoe"
    config = describe(state, path, family, convention, overrides)
    return Weights(convert(state, config, path), config, step, source, path.name, imported=path.name)
