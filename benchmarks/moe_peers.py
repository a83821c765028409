"""The layers that the MoE layer is measured against, all on the same parameters where they have the same ones.

loop        Algorithm 1 of the paper, written straight: a loop over experts with masks, one over centroids
deepspeed   DeepSpeed's native `MoE` (linear softmax gate, capacity 1.25: drops and pads), plus the shared expert
gemms       the matrix products of our layer and nothing else: the floor
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.interleaved import Clock, Work
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.constants import cached_arange
from promoe_ds.moe.experts import grouped_mm
from promoe_ds.moe.layer import LayerStats, MoELayer
from promoe_ds.moe.mlp import Mlp

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [B, S, D] -> (output [B, S, D], auxiliary loss)"""


def force_routing(layer: Any, kind: str) -> None:
    """Overwrite the router's choice: `uniform`, or `skewed` (every token to one expert)."""
    num_experts = len(layer.router.prototypes)

    def choose(expert_N: Tensor) -> Tensor:
        uniform_N = cached_arange(len(expert_N), expert_N.device) % num_experts
        return uniform_N if kind == "uniform" else torch.zeros_like(expert_N)

    layer.choose = choose
    layer.router.register_forward_hook(lambda _, __, made: made._replace(expert_N=choose(made.expert_N)))


def _expert(layer: Any, i: int, x: Tensor) -> Tensor:
    experts = layer.routed.experts
    b1, b2 = experts.w3[i, 0].split([experts.hidden, experts.width])
    return F.linear(F.gelu(F.linear(x, experts.w1[i], b1), approximate="tanh"), experts.w2[i], b2)


def loop_layer(layer: Any, x_BSD: Tensor, split: Split) -> tuple[Tensor, LayerStats]:
    """Algorithm 1 on the parameters of `layer`, as one writes it at first; same results as `layer.forward`, but for the
    terms of the losses: the loss itself."""
    router: Any = layer.router
    x_TD, prototype_ED = x_BSD.flatten(0, 1), router.prototypes
    null_T = (split.label_B == split.label_B.new_tensor(NULL_LABEL)).repeat_interleave(x_BSD.shape[1])
    known_TD, null_TD = x_TD[~null_T], x_TD[null_T]
    with torch.autocast(x_TD.device.type, enabled=False):
        z_TE = F.normalize(known_TD.float(), dim=-1) @ F.normalize(prototype_ED.float(), dim=-1).T
    weight_TK, expert_TK = z_TE.topk(1, dim=-1)
    if choose := getattr(layer, "choose", None):
        expert_TK = choose(expert_TK.view(-1)).view(-1, 1)
    routed_TD = torch.zeros_like(known_TD, dtype=torch.float32)
    count_E = []
    for i in range(len(prototype_ED)):
        row, place = torch.where(expert_TK == i)
        count_E.append(len(row))
        if len(row):
            routed_TD = routed_TD.index_add(0, row, _expert(layer, i, known_TD[row]) * weight_TK[row, place, None])
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    out_TD[~null_T] = routed_TD
    out_TD[null_T] = layer.unconditional[0](null_TD).float()
    out_TD = out_TD + layer.shared[0](x_TD)
    ends = torch.tensor(count_E).cumsum(0).int().to(x_BSD.device)
    losses = {"routing_contrastive": _loop_loss(prototype_ED, known_TD, expert_TK)}
    return out_TD.view_as(x_BSD), LayerStats(losses, ends, weight_TK.view(-1))


def _loop_loss(prototype_ED: Tensor, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
    """Eq. (6) with a loop over centroids."""
    present, centroids = [], []
    for i in range(len(prototype_ED)):
        mine_T = (expert_TK == i).any(1)
        if mine_T.any():
            present.append(i)
            centroids.append(x_TD[mine_T].float().mean(0))
    if len(present) < 2:
        return prototype_ED.sum() * 0
    with torch.autocast(x_TD.device.type, enabled=False):
        p, m = F.normalize(prototype_ED[present].float(), dim=-1), F.normalize(torch.stack(centroids), dim=-1)
        return F.cross_entropy(p @ m.T / 0.07, torch.arange(len(present), device=x_TD.device))


NULL_LABEL = 1000


def use_loop(model: nn.Module, on: bool) -> None:
    """Let every MoE layer of the model compute by `loop_layer`, its loss included, or by itself again."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            router: Any = module.router
            if on:
                module.forward = lambda x, split, _=None, *, layer=module: loop_layer(layer, x, split)  # type: ignore[method-assign]
                router.losses = lambda config, losses, tokens_per_expert_LE, all_reduce: losses
            else:
                module.__dict__.pop("forward", None)
                router.__dict__.pop("losses", None)


def gemms_alone(layer: Any, x_BSD: Tensor, split: Split) -> Work:
    """Forward and backward products of `layer` on x: no bias, no activation.

    An expert has as many rows as the router gives it; gradients go into fresh buffers. Everything is random: zeros and
    ones switch fewer transistors, and a GPU clocks higher on them.
    """
    experts, device = layer.routed.experts, x_BSD.device
    dtype = experts.compute_dtype(device.type)
    x_TD = x_BSD.flatten(0, 1).detach()
    n = split.num_conditional * x_BSD.shape[1]
    inputs = {"known": x_TD[:n].to(dtype), "null": x_TD[n:].to(dtype), "all": x_TD.to(dtype)}
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    hiddens = {name: torch.randn_like(x.detach().new_empty(len(x), experts.hidden)) for name, x in inputs.items()}
    hiddens = {name: h.requires_grad_() for name, h in hiddens.items()}
    scored = x_TD[:n].float().clone().requires_grad_()
    grads: list[Tensor] = []
    with torch.no_grad():
        ends = layer(x_BSD, split)[1].offsets_E

    def work(clock: Clock) -> None:
        clock.mark()
        w1, w2 = experts.w1.to(dtype), experts.w2.to(dtype)
        outs = [grouped_mm(inputs["known"], w1.transpose(1, 2), offs=ends),
                grouped_mm(hiddens["known"], w2.transpose(1, 2), offs=ends)]  # fmt: skip
        for name, mlps in (("null", layer.unconditional), ("all", layer.shared)):
            for mlp in mlps:
                outs += [F.linear(inputs[name], mlp.fc1.weight.to(dtype)),
                         F.linear(hiddens[name], mlp.fc2.weight.to(dtype))]  # fmt: skip
        with torch.autocast(device.type, enabled=False):
            outs.append(scored @ layer.router.prototypes.float().T)
        if not grads:
            grads.extend(torch.randn_like(y) for y in outs)
        torch.autograd.backward(outs, grads)
        for x in (*inputs.values(), *hiddens.values(), scored, *layer.parameters()):
            x.grad = None
        clock.mark()

    return work


def deepspeed_layer(width: int, hidden: int, experts: int, device: torch.device) -> tuple[Step, nn.Module]:
    """DeepSpeed's MoE, k=1, capacity factor 1.25, on one process. Starts a process group of one."""
    from deepspeed.moe.layer import MoE  # a benchmark may: it compares with it

    from promoe_ds.parallel.topology import connect
    from promoe_ds.utils.ranks import ALONE

    connect(ALONE, 30.0)
    moe = MoE(width, Mlp(width, hidden), experts, ep_size=1, k=1, capacity_factor=1.25)
    moe.set_deepspeed_parallelism()
    module = nn.ModuleDict({"moe": moe, "shared": Mlp(width, hidden)}).to(device)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        routed, aux, _ = module["moe"](x)
        return routed + module["shared"](x), aux

    return step, module
