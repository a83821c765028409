"""Reading a published checkpoint: which model it is, whether every key is accounted for, and its weights as ours.

Files are read by `state_files.py`, folders of diffusers by `diffusers_import.py`; neither runs code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.schema import Config
from promoe_ds.formats.card import BASE
from promoe_ds.formats.diffusers_import import read_folder
from promoe_ds.formats.official import CONVENTIONS, FAMILIES, State, from_official, problems, to_official, why_not
from promoe_ds.formats.state_files import counted, read_file
from promoe_ds.formats.weights import Source, Weights
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_config

SIZES = {(12, 384): "s", (12, 768): "b", (24, 1024): "l", (28, 1152): "xl"}
HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16}
"""width -> attention heads of the published sizes: weights do not tell"""
EXTRA = {"projectors.*": "REPA's projectors, which training alone uses"}
"""what is left out without being asked, and what it is"""
FOREIGN = {
    r"(^|\.)blocks\.\d+\.moe\.": "DiT-MoE (feizc): SwiGLU experts without biases",
    r"\.e_score_correction_bias$": "DSMoE: RoPE, SwiGLU experts, sigmoid gates",
    r"(^|\.)patch_blocks\.": "PixelDiT: RoPE, RMSNorm, SwiGLU, pixels",
    r"(^|\.)feat_rope|\.mlp\.w12\.|(^|\.)blocks\.\d+\.norm1\.weight": "LightningDiT or JiT: RoPE, RMSNorm, SwiGLU",
}
"""how keys tell models that are not built here (feizc/DiT-MoE bd34bbb, yhlleo/EfficientMoE, gcy-hub/PixelDiT-ProMoE,
hustvl/LightningDiT 2725fed)"""
SHOWN = 6
NAME_ONE = "name a checkpoint of a diffusion transformer"


def _need(state: State, name: str, dims: int, path: Path) -> torch.Size:
    """The shape of a tensor that sizes are read from."""
    tensor = state.get(name)
    if tensor is None or tensor.ndim != dims:
        got = "is missing" if tensor is None else f"has shape {list(tensor.shape)}, expected {dims} dimensions"
        reject("CHECKPOINT", path, f"{name} {got}", NAME_ONE)
    if not tensor.numel():
        reject("CHECKPOINT", path, f"{name} is empty", NAME_ONE)
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


def refuse_foreign(state: State, path: Path) -> None:
    """Raise ConfigError for a model that is known and not built here."""
    for pattern, who in FOREIGN.items():
        if name := next((name for name in sorted(state) if re.search(pattern, name)), None):
            reject("CHECKPOINT", path, f"{name} is of {who}: not built here", NAME_ONE)


def drop(state: State, needed: State, patterns: Sequence[str], path: Path) -> tuple[State, list[str]]:
    """Leave out what `EXTRA` or `--drop` names -> (the rest, what was left out, for people).

    Raises:
        ConfigError: a pattern that matches nothing, or something that the model needs.
    """
    notes = []
    for pattern in (*EXTRA, *patterns):
        names = sorted(name for name in state if fnmatchcase(name, pattern))
        if kept := [name for name in names if name in needed]:
            reject("--drop", pattern, f"matches {kept[0]}, which the model needs", "narrow the pattern")
        if names:
            what = f" ({EXTRA[pattern]})" if pattern in EXTRA else ""
            notes.append(f"left out {counted(len(names))} {pattern}{what}")
        state = {name: tensor for name, tensor in state.items() if name not in names}
    return state, notes


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
    dropped: Sequence[str] = (),
    ema_std: float | None = None,
) -> Weights:
    """Read a published checkpoint.

    Without a convention, a file that names its weights as ProMoE's code does is of ProMoE's, and a folder of diffusers
    is a DDPM; others do not tell.

    Args:
        path: a file, or a folder that diffusers wrote.
        source: averaged or raw weights, where it holds both.
        dropped: patterns of names that are left out, as `fnmatch` reads them.
        ema_std: which of edm2's averages.

    Raises:
        ConfigError: as of `describe`, `drop`, `convert`, `read_file` and `read_folder`; a pattern that matches nothing.
    """
    if family is not None and family not in FAMILIES:
        reject("--family", family, f"must be one of {', '.join(FAMILIES)}", did_you_mean(family, FAMILIES))
    hits = dict.fromkeys(dropped, False)

    def is_dropped(name: str) -> bool:
        found = [pattern for pattern in dropped if fnmatchcase(name, pattern)]
        hits.update(dict.fromkeys(found, True))
        return bool(found)

    found = read_folder(path) if path.is_dir() else read_file(path, source, is_dropped, ema_std)
    for name in found.state:
        is_dropped(name)
    if unused := [pattern for pattern, hit in hits.items() if not hit]:
        heads = ", ".join(sorted({name.split(".")[0] for name in found.state})[:10])
        reject("--drop", unused[0], f"matches no name in {path} ({heads})", "correct it or leave it out")
    if convention is None:
        if not (found.promoe or found.convention):
            choices = "; ".join(f"{name} ({how.who})" for name, how in CONVENTIONS.items())
            reject("--convention", "none", f"{path} does not say how it was trained", f"choose one: {choices}")
        convention = found.convention or "promoe"
    refuse_foreign(found.state, path)
    config = describe(found.state, path, family, convention, [*found.overrides, *overrides])
    state, notes = drop(found.state, to_official(dict(build(config).state_dict()), config), dropped, path)
    tensors = convert(state, config, path)
    return Weights(tensors, config, found.step, source, path.name, imported=path.name, notes=(*found.notes, *notes))
