"""What routers are built from: scores of a linear gate, the two ways to choose by them, and options with their checks.

Legend as in `router.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.config.option import option
from promoe_ds.config.schema import Config, RouterConfig
from promoe_ds.moe.constants import cached_arange
from promoe_ds.moe.recompute import cast, linear
from promoe_ds.moe.router import Router, Routing


@dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """Options of a router that gives each token K experts."""

    top_k: int = option(1, "K, experts per token; on average, where experts choose")

    def validate(self, config: Any) -> None:
        """`top_k` lies in 1..E."""
        E = config.moe.num_experts
        if not 1 <= self.top_k <= E:
            limit = f"is not in 1..moe.num_experts={E}"
            reject("moe.router.top_k", self.top_k, limit, "lower it" if self.top_k > 0 else "raise it")


@dataclass(frozen=True, kw_only=True)
class PerImageConfig(TopKConfig):
    """Options of a router whose experts choose among the tokens of each image."""

    def validate(self, config: Any) -> None:
        super().validate(config)
        check_quota(self, config, 1, "an image")


@dataclass(frozen=True, kw_only=True)
class BiasedConfig(TopKConfig):
    """Options of a router whose load may be balanced by biases."""

    bias_rate: float = option(
        0.0,
        "balance without a loss (arXiv:2408.15664): after each step a bias per expert moves by this much against its "
        "load; it is added to the scores where experts are chosen, not to the gate weights; 0: there is no bias",
        at_least=0,
        change="resume",
        almost_off=1e-9,
    )


class BiasedRouter(Router):
    """Choice of experts by scores plus a bias that follows the load.

    b_i += bias_rate * sign(mean load - load_i), by the edges of all ranks and micro-batches of a step: every rank
    computes the same from the same sums. The bias is a buffer, saved with the EMA weights and not averaged.
    """

    def __init__(self, config: Any, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.empty(num_experts) if config.bias_rate else None)
        self.wants_load = config.bias_rate > 0

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        super().init_weights(generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def follow_load(self, load_E: Tensor) -> None:
        assert self.bias is not None
        self.bias.add_((load_E.mean() - load_E).sign(), alpha=self.config.bias_rate)


class LinearGateRouter(Router):
    """Scores by a linear layer without bias and a softmax over the experts."""

    def __init__(self, config: Any, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.gate = nn.Parameter(torch.empty(num_experts, width))

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        nn.init.normal_(self.gate, std=0.006, generator=generator("gate"))

    def logits(self, x_TD: Tensor) -> Tensor:
        """float32 [T, E] whatever the autocast: bf16 scores would tie and flip the choice."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(at_least_fp32(x_TD), at_least_fp32(self.gate))

    def scores(self, x_TD: Tensor) -> Tensor:
        """The softmax of `logits`."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.logits(x_TD).softmax(dim=-1)


def at_least_fp32(x: Tensor) -> Tensor:
    """Scores and losses are computed in fp32 whatever the autocast; float64 stays."""
    return x if x.dtype == torch.float64 else cast(x, torch.float32)


def of_their_sum(score: Tensor) -> Tensor:
    """Scores, none negative, over their sum in the last dimension. Sums below DeepSeek-V3's 1e-20 count as that:
    in fp32 sigmoids may all be 0, and stay so."""
    return score / score.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def top_experts(score_TE: Tensor, top_k: int, bias_E: Tensor | None = None) -> Routing:
    """Token choice: each token goes to the K experts of highest score, which is the gate weight.

    Args:
        bias_E: added to the scores for the choice alone.
    """
    ranked_TE = score_TE if bias_E is None else score_TE.detach() + bias_E.to(score_TE.dtype)
    if top_k == 1:
        weight_N, expert_N = ranked_TE.max(dim=-1)  # several times faster than topk on a CPU
    else:
        weight_N, expert_N = (x_TK.view(-1) for x_TK in ranked_TE.topk(top_k, dim=-1))
    if bias_E is not None:
        weight_N = score_TE.gather(1, expert_N.view(-1, top_k)).view(-1)
    return Routing(cached_arange(len(score_TE), score_TE.device, top_k), expert_N, weight_N, top_k, {})


def top_tokens_per_image(score_TE: Tensor, S: int, quota: int) -> Routing:
    """Expert choice: each expert takes the `quota` tokens of each image with the highest score, which is the weight.

    Edges come expert by expert, N = E*B*quota.
    """
    score_BSE = score_TE.unflatten(0, (-1, S))
    # Permuted after the choice: before it, torch 2.13's compiler computes wrong gradients of a softmax (on CPU).
    score_EBk, position_EBk = (x_BkE.permute(2, 0, 1) for x_BkE in score_BSE.topk(quota, dim=1))
    first_B = torch.arange(len(score_BSE), device=score_TE.device) * S
    token_N, expert_N = expert_major((position_EBk + first_B[:, None]).flatten(1))
    return Routing(token_N, expert_N, score_EBk.reshape(-1), 0, {})


def expert_major(token_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of an expert choice: int64 [E, n], the tokens taken by each expert -> (token_N, expert_N), N = E*n."""
    expert_E = torch.arange(len(token_EN), device=token_EN.device)
    return token_EN.reshape(-1), expert_E.repeat_interleave(token_EN.shape[1])


def check_quota(router: Any, config: Config, images: int, pool: str) -> None:
    """An expert that chooses among the tokens of `images` images takes at least one."""
    assert config.moe is not None
    E, tokens = config.moe.num_experts, images * config.model.tokens
    if tokens * router.top_k < E:
        conflict = f"an expert's quota of {pool} is {tokens} tokens * top_k={router.top_k} // {E} experts = 0"
        way_out = f"lower it to at most {tokens * router.top_k}, or raise moe.router.top_k"
        reject("moe.num_experts", E, conflict, way_out)
