"""DiT.forward against the transformer written out plainly in float64, image by image, from the papers' formulas.

DiT (arXiv:2212.09748) with adaLN-zero, patch tokens in row-major order, GELU(tanh) MLPs; the MoE block from Eq. (5) of
arXiv:2510.24711. Random weights everywhere, so that a swapped, missing or misplaced part shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_config

State = dict[str, Tensor]
NULL = 10


def random_model(*overrides: str) -> DiT:
    model = materialize(build(load_config("tiny", ["moe.experts_backend=loop", *overrides])), 0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def timestep(s: State, t: float) -> Tensor:
    angle = [t * 1e4 ** (-i / 128) for i in range(128)]
    wave = torch.tensor([math.cos(a) for a in angle] + [math.sin(a) for a in angle], dtype=torch.float64)
    return linear(s, "t_embedder.mlp.2", silu(linear(s, "t_embedder.mlp.0", wave)))


def condition(s: State, t: float, label: int) -> Tensor:
    return timestep(s, t) + s["y_embedder.weight"][label]


def attention(s: State, name: str, x_SD: Tensor, heads: int) -> Tensor:
    S, D = x_SD.shape
    q, k, v = linear(s, f"{name}.qkv", x_SD).split(D, dim=-1)
    out, d = torch.empty_like(x_SD), D // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        out[:, part] = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1) @ v[:, part]
    return linear(s, f"{name}.proj", out)


def mlp(s: State, name: str, x: Tensor) -> Tensor:
    return linear(s, f"{name}.fc2", gelu(linear(s, f"{name}.fc1", x)))


def moe(s: State, name: str, x_SD: Tensor, seen_SD: Tensor, label: int, hidden: int) -> Tensor:
    out = mlp(s, f"{name}.shared.0", x_SD)
    if label == NULL:
        return out + mlp(s, f"{name}.unconditional.0", x_SD)
    p, e = s[f"{name}.router.prototypes"], f"{name}.routed.experts"
    for i, (x, seen) in enumerate(zip(x_SD, seen_SD, strict=True)):
        cosine = p @ seen / (p.norm(dim=-1) * seen.norm())
        j = int(cosine.argmax())
        b1, b2 = s[f"{e}.w3"][j, 0, :hidden], s[f"{e}.w3"][j, 0, hidden:]
        out[i] += cosine[j] * (s[f"{e}.w2"][j] @ gelu(s[f"{e}.w1"][j] @ x + b1) + b2)
    return out


def plain_dit(model: DiT, x_CHW: Tensor, t: float, label: int) -> Tensor:
    m, s = model.config.model, dict(model.state_dict())
    P, side = m.patch, m.image_size // m.patch
    kernel = s["x_embedder.proj.weight"]
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = x_CHW[:, row * P : (row + 1) * P, column * P : (column + 1) * P]
            tokens.append((kernel * patch).sum((1, 2, 3)) + s["x_embedder.proj.bias"])
    x, c = torch.stack(tokens) + s["pos_embed"][0], condition(s, t, label)
    for i in range(m.depth):
        b = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(s, f"{b}.adaLN.linear", silu(c)).split(m.width)
        x = x + gate_a * attention(s, f"{b}.attn", norm(x) * (1 + scale_a) + shift_a, m.heads)
        h = norm(x) * (1 + scale_m) + shift_m
        if i in model.config.moe_layers():
            assert model.config.moe is not None
            seen = {"modulated": h, "plain": norm(x)}.get(model.config.moe.router_input)
            if seen is None:
                seen = torch.stack([torch.cat([token, timestep(s, t)]) for token in norm(x)])
            x = x + gate_m * moe(s, f"{b}.mlp", h, seen, label, 2 * m.width)
        else:
            x = x + gate_m * mlp(s, f"{b}.mlp", h)
    shift, scale = linear(s, "final_layer.adaLN.linear", silu(c)).split(m.width)
    out = linear(s, "final_layer.linear", norm(x) * (1 + scale) + shift)
    image = torch.empty(m.out_channels, m.image_size, m.image_size, dtype=torch.float64)
    for n, token in enumerate(out):
        row, column = divmod(n, side)
        for p in range(P):
            for q in range(P):
                for ch in range(m.out_channels):
                    image[ch, row * P + p, column * P + q] = token[(p * P + q) * m.out_channels + ch]
    return image


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("moe=null",),
        ("model.learn_sigma=true", "model.channels=3"),
        ("moe.router_input=plain",),
        ("moe.router_input=plain+t",),
    ],
)
def test_forward_equals_the_plain_transformer(overrides: tuple[str, ...]) -> None:
    model = random_model(*overrides)
    m = model.config.model
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, m.channels, 8, 8, generator=generator, dtype=torch.float64)
    t, labels = torch.tensor([0.0, 321.5, 1000.0]), torch.tensor([3, NULL, 7])
    out = model(x, t, labels).prediction
    for i in range(3):
        expected = plain_dit(model, x[i], float(t[i]), int(labels[i]))
        # the timestep's sinusoids are float32 by design
        torch.testing.assert_close(out[i], expected, rtol=1e-3, atol=2e-4)
