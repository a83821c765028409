"""Checkpoints as the official code writes them, from the table of their keys, and their models in plain float64.

Written from the papers and the published key layout, with nothing of this project's model: image by image, token by
token. Legend: S tokens, D width, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.models.test_dit_reference import attention, condition, gelu, linear, norm, silu

D, HEADS, DEPTH, CLASSES, SIDE, CHANNELS = 32, 4, 4, 5, 8, 3
State = dict[str, Tensor]


class Family(NamedTuple):
    experts: int
    hidden: int
    names: tuple[str, str] = ("fc1", "fc2")


FAMILIES = {
    "dense": Family(0, 0),
    "promoe": Family(6, 2 * D, ("up_proj", "down_proj")),
    "promoe_ec": Family(6, 2 * D, ("up_proj", "down_proj")),
    "token_choice": Family(4, 4 * D),
    "expert_choice": Family(4, 4 * D),
    "diffmoe": Family(4, 4 * D),
}


def shapes(family: str, qk_norm: bool = False) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint of depth 4, width 32: MoE in blocks 1 and 3."""
    E, F, (up, down) = FAMILIES[family]
    out: dict[str, tuple[int, ...]] = {"pos_embed": (1, 16, D)}

    def layer(name: str, inside: int, outside: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (outside, inside), (outside,)

    def expert(name: str) -> None:
        layer(f"{name}.{up}", D, F)
        layer(f"{name}.{down}", F, D)

    out |= {"x_embedder.proj.weight": (D, CHANNELS, 2, 2), "x_embedder.proj.bias": (D,)}
    layer("t_embedder.mlp.0", 256, D)
    layer("t_embedder.mlp.2", D, D)
    out["y_embedder.embedding_table.weight"] = (CLASSES + 1, D)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        layer(f"{b}.attn.qkv", D, 3 * D)
        layer(f"{b}.attn.proj", D, D)
        if qk_norm:
            for name in ("q_norm", "k_norm"):
                out |= {f"{b}.attn.{name}.weight": (D // HEADS,), f"{b}.attn.{name}.bias": (D // HEADS,)}
        layer(f"{b}.adaLN_modulation.1", D, 6 * D)
        if i % 2 == 0 or family == "dense":
            layer(f"{b}.mlp.fc1", D, 4 * D)
            layer(f"{b}.mlp.fc2", 4 * D, D)
            continue
        if family.startswith("promoe"):
            out[f"{b}.mlp.cluster_centers"] = (E, D)
            expert(f"{b}.mlp.shared_expert")
        else:
            out[f"{b}.mlp.{'gate.weight' if family == 'token_choice' else 'gate_weight'}"] = (E, D)
        if family == "diffmoe":
            out |= {f"{b}.mlp.expert_threshold": (E,), f"{b}.mlp.ema_decay": (1,)}
            layer(f"{b}.mlp.capacity_predictor.0", D, D)
            layer(f"{b}.mlp.capacity_predictor.2", D, E)
        for e in range(E + family.startswith("promoe")):
            expert(f"{b}.mlp.experts.{e}")
    layer("final_layer.adaLN_modulation.1", D, 2 * D)
    layer("final_layer.linear", D, 4 * 2 * CHANNELS)
    return out


def random_state(family: str, seed: int = 0, qk_norm: bool = False) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(s, generator=generator) * 0.2 for k, s in shapes(family, qk_norm).items()}
    for name in state:
        if name.endswith("expert_threshold"):
            state[name] = 0.5 + state[name] / 4
        elif name.endswith("ema_decay"):
            state[name] = torch.tensor([0.95])
    return state


def mlp(s: State, name: str, x: Tensor, names: tuple[str, str] = ("fc1", "fc2")) -> Tensor:
    return linear(s, f"{name}.{names[1]}", gelu(linear(s, f"{name}.{names[0]}", x)))


def gates(s: State, name: str, x_SD: Tensor, family: str) -> list[tuple[int, int, Tensor]]:
    """(token, expert, weight) of one image."""
    E, S = FAMILIES[family].experts, len(x_SD)
    if family.startswith("promoe"):
        score = torch.stack(
            [torch.stack([p @ x / (p.norm() * x.norm()) for p in s[f"{name}.cluster_centers"]]) for x in x_SD]
        )
    else:
        gate = s[f"{name}.{'gate.weight' if family == 'token_choice' else 'gate_weight'}"]
        score = torch.stack([torch.exp(gate @ x) / torch.exp(gate @ x).sum() for x in x_SD])
    if family in ("promoe", "token_choice"):
        return [(t, e := int(score[t].argmax()), score[t, e]) for t in range(S)]
    if family == "diffmoe":
        predictor, limit = f"{name}.capacity_predictor", s[f"{name}.expert_threshold"]
        likely = torch.sigmoid(linear(s, f"{predictor}.2", silu(linear(s, f"{predictor}.0", x_SD))))
        return [(t, e, score[t, e]) for t in range(S) for e in range(E) if likely[t, e] > limit[e]]
    best = [sorted(range(S), key=lambda t: -float(score[t, e]))[: S // E] for e in range(E)]  # noqa: B023
    return [(t, e, score[t, e]) for e in range(E) for t in best[e]]


def feed_forward(s: State, name: str, x_SD: Tensor, label: int, family: str) -> Tensor:
    if f"{name}.fc1.weight" in s:
        return mlp(s, name, x_SD)
    E, _, names = FAMILIES[family]
    out = torch.zeros_like(x_SD)
    if family.startswith("promoe"):
        out = mlp(s, f"{name}.shared_expert", x_SD, names)
        if label == CLASSES:
            return out + mlp(s, f"{name}.experts.{E}", x_SD, names)
    for t, e, weight in gates(s, name, x_SD, family):
        out[t] = out[t] + weight * mlp(s, f"{name}.experts.{e}", x_SD[t], names)
    return out


def forward(state: State, family: str, x_CHW: Tensor, t: float, label: int) -> Tensor:
    """The prediction of the checkpoint's own code for one image; t as that code counts it."""
    s = {name: tensor.double() for name, tensor in state.items()} | {
        "y_embedder.weight": state["y_embedder.embedding_table.weight"].double()
    }
    kernel = s["x_embedder.proj.weight"]
    patches = [x_CHW[:, r : r + 2, c : c + 2] for r in range(0, SIDE, 2) for c in range(0, SIDE, 2)]
    x = torch.stack([(kernel * p).sum((1, 2, 3)) + s["x_embedder.proj.bias"] for p in patches]) + s["pos_embed"][0]
    c = condition(s, t, label)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        parts = linear(s, f"{b}.adaLN_modulation.1", silu(c)).split(D)
        x = x + parts[2] * attention(s, f"{b}.attn", norm(x) * (1 + parts[1]) + parts[0], HEADS)
        x = x + parts[5] * feed_forward(s, f"{b}.mlp", norm(x) * (1 + parts[4]) + parts[3], label, family)
    shift, scale = linear(s, "final_layer.adaLN_modulation.1", silu(c)).split(D)
    out = linear(s, "final_layer.linear", norm(x) * (1 + scale) + shift)
    image = torch.empty(2 * CHANNELS, SIDE, SIDE, dtype=torch.float64)
    for n, token in enumerate(out):
        row, column = divmod(n, SIDE // 2)
        image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = token.view(2, 2, -1).permute(2, 0, 1)
    assert not math.isnan(float(image.sum()))
    return image
