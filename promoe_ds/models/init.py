"""Building a model: on `meta` first (sizes cost nothing), then allocated and drawn, each parameter from its own stream.

The stream of a parameter is keyed by (seed, full name, global expert id), so the initial model depends on nothing but
the configuration and the seed: not on the device, the world size or the expert-parallel degree.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import nn

from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT, PatchProjection
from promoe_ds.models.layers import Modulation, grid_sinusoids


def generator(seed: int, prefix: str, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, prefix.name)."""
    digest = hashlib.blake2b(f"{seed}/{prefix}.{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def build(config: Config) -> DiT:
    """The model on `meta`: right shapes, no memory."""
    with torch.device("meta"):
        return DiT(config)


def materialize(model: DiT, seed: int, device: torch.device | str = "cpu") -> DiT:
    """Allocate a meta model on `device` and draw its parameters; returns the same object.

    Drawn on the CPU for every device, so that all devices start from the same bits.
    """
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))  # `to_empty` would first import sympy
    init_weights(model, seed)
    return model.to(device)


@torch.no_grad()
def draw_labels(table: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw the label table, [classes + 1, D], in place."""
    return nn.init.normal_(table, std=0.02, generator=generator(seed, "y_embedder", "weight"))


@torch.no_grad()
def init_weights(model: DiT, seed: int) -> None:
    """Initialise as the official code does (DiT's rules, xavier for the experts too):

    | part | rule |
    |---|---|
    | every linear layer, shared and unconditional experts, patch embedding (flattened) | xavier uniform, bias 0 |
    | routed experts | xavier uniform per expert, bias 0 |
    | label table, timestep MLP | N(0, 0.02) |
    | adaLN outputs, final linear layer | 0 |
    | prototypes | N(0, 0.02) |
    | positions | 2-D sine-cosine table, fixed |
    """
    for prefix, module in model.named_modules():
        draw = partial(generator, seed, prefix)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=draw("weight"))
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchProjection):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=draw("weight"))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding):
            draw_labels(module.weight, seed)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "init_weights"):
            module.init_weights(draw)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
    for i in (0, 2):
        weight: torch.Tensor = model.t_embedder.mlp[i].weight  # type: ignore[assignment]
        nn.init.normal_(weight, std=0.02, generator=generator(seed, f"t_embedder.mlp.{i}", "normal"))
    nn.init.zeros_(model.final_layer.linear.weight)
    m = model.config.model
    model.pos_embed.copy_(grid_sinusoids(m.width, m.image_size // m.patch))
