"""Upcycling: a dense block's MLP becomes the experts of a MoE layer ("sparse upcycling", arXiv:2212.05055).

The hidden units of the MLP, 4D in every DiT, are cut into N_s + 1 slices of an expert's width F. Each shared expert
gets one of the first N_s, and every routed and every unconditional expert a copy of the last. W2's bias goes to the
first shared expert. The units are sorted before, by the product of the lengths of their rows in W1 and columns in W2:
those that matter most go where no gate can weaken them. With gate weights of 1,

    sum_s E_s^S(x) + E_j(x) = W2 gelu(W1 x + b1) + b2 for every j: the dense model, whatever the router chooses.

K routed experts of a token, or several unconditional ones, share the last slice evenly: their W2 is divided by their
number. Raw cosine gates are not 1, and scale the last slice (docs/finetuning.md has what that costs).

Legend: D width, H hidden width of the dense MLP, F of an expert, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config

DENSE = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
"""the tensors of a dense block's MLP, by name"""


def check_split(config: Config) -> None:
    """Raise ConfigError if the dense MLP does not divide into these experts."""
    moe = config.moe
    assert moe is not None
    ratio = config.model.mlp_ratio / (moe.num_shared + 1)
    if moe.hidden_ratio != ratio:
        conflict = f"a dense MLP of model.mlp_ratio={config.model.mlp_ratio:g} is split into moe.num_shared + 1 slices"
        reject("moe.hidden_ratio", moe.hidden_ratio, f"{conflict} of {ratio:g} each", f"set it to {ratio:g}")


def upcycled(mlp: Mapping[str, Tensor], config: Config, part: str) -> Tensor:
    """One tensor of the MoE layer that a dense MLP becomes.

    Args:
        mlp: `DENSE` of the block, float32: [H, D], [H], [D, H], [D].
        config: of the model with experts, which `check_split` has passed.
        part: its name in the layer, such as `shared.0.fc1.weight` or `routed.experts.w1`.
    """
    moe = config.moe
    assert moe is not None
    F, last = int(moe.hidden_ratio * config.model.width), moe.num_shared
    kind, _, rest = part.partition(".")
    index, _, field = rest.partition(".")
    if kind == "shared":
        return _slice(mlp, F, int(index), 1, bias=index == "0")[field].contiguous()
    if kind == "unconditional":
        return _slice(mlp, F, last, moe.num_unconditional, bias=last == 0)[field].contiguous()
    expert = _slice(mlp, F, last, getattr(moe.router, "top_k", 1), bias=last == 0)
    biases = torch.cat([expert["fc1.bias"], expert["fc2.bias"]])[None]
    one = {"w1": expert["fc1.weight"], "w2": expert["fc2.weight"], "w3": biases}[field]
    return one.expand(moe.num_experts, *one.shape).contiguous()


def by_weight(mlp: Mapping[str, Tensor]) -> Tensor:
    """Hidden units, the heaviest first; int64 [H]."""
    weight_H = mlp["fc1.weight"].norm(dim=1) * mlp["fc2.weight"].norm(dim=0)
    return weight_H.argsort(descending=True, stable=True)


def _slice(mlp: Mapping[str, Tensor], F: int, index: int, number: int, bias: bool) -> dict[str, Tensor]:
    """The `index`-th F hidden units as an MLP, one of `number` whose outputs are added; with W2's bias or without."""
    here = by_weight(mlp)[index * F : (index + 1) * F]
    return {
        "fc1.weight": mlp["fc1.weight"][here],
        "fc1.bias": mlp["fc1.bias"][here],
        "fc2.weight": mlp["fc2.weight"][:, here] / number,
        "fc2.bias": mlp["fc2.bias"] / number * bias,
    }
