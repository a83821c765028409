"""A folder of diffusers' `DiTTransformer2DModel`, or the pipeline around it, in the official layout.

Read from diffusers 0.42.1 (`models/transformers/dit_transformer_2d.py`, `models/attention.py`). Where it differs from
DiT's own code:

- Queries, keys and values are three layers: stacked here.
- Every block holds the timestep and label embedders again. They must be equal, as in a port of DiT's weights; each got
  gradients of its own where diffusers' model was trained.
- The periods of the timestep embedding are 1e4^(i/127), DiT's are 1e4^(i/128): `model.time_divisor`.
- The position table is computed, not stored. The null label is the last row of the label table; `DiTPipeline` always
  asks for row 1000, which is the same with 1000 classes alone.
- `DiTPipeline` guides all channels, DiT's code three.
- The norm before the MLP has eps 1e-5 unless the folder says otherwise; here, as in DiT, 1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from promoe_ds.checkpoint.layout import FORMAT
from promoe_ds.config.errors import reject, written
from promoe_ds.formats.diffusers_export import TRANSFORMER
from promoe_ds.formats.state_files import Found, State, load_plain
from promoe_ds.models.layers import grid_sinusoids
from promoe_ds.utils.files import read_json

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""the second in folders that older versions wrote"""
COMPUTED = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
}
"""what this project computes, the first being the default there"""
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
AROUND = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
STEM = "diffusion_pytorch_model"


def _config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the transformer and its config.json; raises ConfigError if it computes something else."""
    found = [f for f in (folder, folder / "transformer") if (f / "config.json").is_file()]
    if not found:
        reject("CHECKPOINT", folder, "has no config.json of a diffusers transformer", "name its transformer folder")
    file = found[0] / "config.json"
    try:
        tree = read_json(file)
        name = tree.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        reject("CHECKPOINT", file, f"cannot be used ({error!r})", f"name a folder of {CLASSES[0]}")
    if name == TRANSFORMER:
        way_out = "draw from it with DiffusionPipeline, or export its run with --format safetensors"
        reject("CHECKPOINT", folder, "is a ProMoE pipeline, which launchers/export.py wrote for diffusers", way_out)
    if tree.get("format") == FORMAT:
        way_out = "name it as it is: --model, train.init or promoe_ds.load_model"
        reject("CHECKPOINT", folder, "is a weights folder of this project", way_out)
    if name not in CLASSES:
        reject("CHECKPOINT", file, f"describes a {name}", f"name a folder of {CLASSES[0]}")
    try:
        sizes = {key: int(tree[key]) for key in ("num_attention_heads", "num_layers", "sample_size", "patch_size")}
        if wrong := [key for key, value in sizes.items() if value < 1]:
            raise ValueError(f"{wrong[0]} is {sizes[wrong[0]]}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reject("CHECKPOINT", file, f"cannot be used ({error!r})", f"name a folder of {CLASSES[0]}")
    for key, values in COMPUTED.items():
        if (value := tree.get(key, values[0])) not in values:
            conflict = f"{key} is {written(value)}, which is not built here"
            reject("CHECKPOINT", file, conflict, f"it must be {written(values[0])}")
    return found[0], sizes


def _tensors(folder: Path) -> State:
    """The tensors under their names in diffusers."""
    index, whole = folder / f"{STEM}.safetensors.index.json", folder / f"{STEM}.safetensors"
    if whole.is_file() or not index.is_file():
        return load_plain(whole if whole.is_file() else folder / f"{STEM}.bin")
    try:
        parts = sorted({Path(part).name for part in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reject("CHECKPOINT", index, f"is no index of weights ({error!r})", "get the folder again")
    return {name: t for part in parts for name, t in load_plain(folder / part).items()}


def to_official_names(state: State, layers: int, path: Path) -> State:
    """Tensors under official names; those unknown here keep theirs, and will be called unexpected.

    Raises:
        ConfigError: embedders that differ between blocks.
    """
    names = {f"{old}.{end}": f"{new}.{end}" for old, new in AROUND.items() for end in ("weight", "bias")}
    out, state = {}, dict(state)
    for i in range(layers):
        block = f"transformer_blocks.{i}"
        for old, new in BLOCK.items():
            names |= {f"{block}.{old}.{end}": f"blocks.{i}.{new}.{end}" for end in ("weight", "bias")}
        for end in ("weight", "bias"):
            parts = [state.pop(f"{block}.attn1.to_{x}.{end}", None) for x in "qkv"]
            if all(part is not None for part in parts):
                out[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)  # type: ignore[arg-type]
            for old, new in EMBEDDERS.items():
                tensor = state.pop(name := f"{block}.norm1.emb.{old}.{end}", None)
                if tensor is None:
                    continue
                if not torch.equal(out.setdefault(f"{new}.{end}", tensor), tensor):
                    conflict = f"{name} differs from block 0's: blocks have embedders of their own"
                    reject("CHECKPOINT", path, conflict, "name a port of weights that DiT's code trained")
    return out | {names.get(name, name): tensor for name, tensor in state.items()}


def read_folder(path: Path) -> Found:
    """The weights of a folder; raises ConfigError if it is another model or damaged."""
    folder, sizes = _config(path)
    state = to_official_names(_tensors(folder), sizes["num_layers"], path)
    table = state.pop("pos_embed.pos_embed", None)
    width = state["x_embedder.proj.weight"].shape[0] if "x_embedder.proj.weight" in state else 4
    side = sizes["sample_size"] // sizes["patch_size"]
    state["pos_embed"] = grid_sinusoids(width, side) if table is None else table
    notes = (
        "time embedding as diffusers computes it (model.time_divisor=127); weights that DiT's own code trained, such "
        "as facebook/DiT-XL-2-256, were trained with model.time_divisor=128",
    )
    overrides = (f"model.heads={sizes['num_attention_heads']}", "model.time_divisor=127", "guidance.channels=all")
    return Found(state, notes=notes, overrides=overrides, convention="ddpm")
