"""DiffMoE (arXiv:2503.14487): expert choice over the pool of all tokens of a batch, with a capacity predictor.

Training: scores are a softmax over the experts; each expert takes the k = T*K // E tokens of the pool with the highest
score for it. A small MLP learns from detached tokens which tokens each expert takes (binary cross-entropy), and a
running threshold for each expert follows the k-th largest prediction in the pool. Inference: the thresholds decide, so
the number of tokens an expert takes varies, and no pool is needed.

The pool of scope `global` is the micro-batch of all ranks, whose k-th largest score is found from the gathered scores:
on several ranks every token of at least that score is taken (equal scores at the boundary all are; on one rank exactly
k tokens are), and the number of edges of one rank is read on the host. Scope `rank` does neither.
Legend: P tokens of the pool, padding included; C = 2E columns, scores and predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.option import option
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.gates import (
    LinearGateRouter,
    TopKConfig,
    at_least_fp32,
    check_quota,
    expert_major,
)
from promoe_ds.moe.losses import Scope, mean_over_scope, sum_and_number
from promoe_ds.moe.router import Reducer, Routing, Tensors, register_router


@dataclass(frozen=True, kw_only=True)
class DiffMoEConfig(TopKConfig):
    capacity_weight: float = option(
        0.01,
        "weight of the capacity predictor's loss, per MoE layer. 0.01 is what the official ProMoE code trains with "
        "(its config says 1, but is not read); DiffMoE's own code uses 1. Only the predictor's gradient depends on it",
        at_least=0,
        change="finetune",
    )
    threshold_decay: float = option(
        0.95, "decay of the moving average of the thresholds", at_least=0, below=1, change="finetune"
    )
    scope: Scope = option(
        "global",
        "the pool: the micro-batch of all ranks (independent of the topology) or of one rank, as in the official code",
        change="finetune",
    )
    inference: Literal["token", "pool"] = option(
        "token",
        "token: an expert takes the tokens whose prediction is above its threshold: an image does not depend on its "
        "batch; pool: it takes that many tokens, but those of highest score in the batch, as in the official code",
    )

    def validate(self, config: Any) -> None:
        super().validate(config)
        images = config.train.micro_batch_size or config.train.global_batch_size  # of one process alone, at most
        check_quota(self, config, images, "the pool")


class Choice(NamedTuple):
    """What the experts take of this rank's tokens."""

    token_N: Tensor
    expert_N: Tensor
    taken_TE: Tensor
    """1.0 where taken"""
    kth_E1: Tensor
    """the k-th largest prediction of the pool for each expert, and 1; all 0 if k is 0"""


def choose_here(score_TE: Tensor, likely_TE: Tensor, quota: int) -> Choice:
    """The pool is this rank's tokens: exactly `quota` tokens per expert."""
    token_kE = score_TE.topk(quota, dim=0).indices
    token_N, expert_N = expert_major(token_kE.T)
    taken_TE = torch.zeros_like(score_TE).scatter(0, token_kE, 1.0)
    kth_E = likely_TE.topk(quota, dim=0).values[-1] if quota else likely_TE.new_zeros(likely_TE.shape[1])
    return Choice(token_N, expert_N, taken_TE, F.pad(kth_E, (0, 1), value=float(quota > 0)))


def choose_in_pool(score_TE: Tensor, pool_PC: Tensor, top_k: int) -> Choice:
    """The pool is spread over ranks: tokens whose score is at least the k-th largest of the pool.

    Args:
        score_TE: float32 [T, E], this rank's scores.
        pool_PC: float32 [P, 2E], scores and predictions of all ranks; rows of padding are negative.
        top_k: K.
    """
    E = score_TE.shape[1]
    quota = (pool_PC[:, 0] >= 0).sum() * top_k // E
    place_1C = (quota - 1).clamp(min=0).expand(1, 2 * E)
    kth_C = pool_PC.sort(dim=0, descending=True).values.gather(0, place_1C)[0]
    taken_TE = (score_TE >= kth_C[:E]) & (quota > 0)
    token_N, expert_N = taken_TE.nonzero().unbind(1)  # this rank's number of edges depends on the others' scores
    kth_E1 = torch.cat([kth_C[E:], torch.ones_like(kth_C[:1])]) * (quota > 0)
    return Choice(token_N, expert_N, taken_TE.to(score_TE.dtype), kth_E1)


@register_router("diffmoe")
class DiffMoERouter(LinearGateRouter):
    Config = DiffMoEConfig

    def __init__(self, config: DiffMoEConfig, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.hidden_weight, self.hidden_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.out_weight = nn.Parameter(torch.empty(num_experts, width))
        self.out_bias = nn.Parameter(torch.empty(num_experts))
        self.threshold: Tensor
        self.updates: Tensor
        self.register_buffer("threshold", torch.empty(num_experts))
        """of the sigmoid of the prediction"""
        self.register_buffer("updates", torch.empty(1))

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        super().init_weights(generator)
        for name in ("hidden", "out"):
            nn.init.xavier_uniform_(getattr(self, f"{name}_weight"), generator=generator(f"{name}_weight"))
            nn.init.zeros_(getattr(self, f"{name}_bias"))
        nn.init.constant_(self.threshold, 0.5)
        nn.init.zeros_(self.updates)

    def predict(self, x_TD: Tensor) -> Tensor:
        """Logits of "expert i takes token t", Linear(D, D) - SiLU - Linear(D, E) on detached tokens; [T, E].

        The wide product runs in the precision of autocast, the logits in fp32.
        """
        h_TD = F.silu(F.linear(x_TD.detach(), self.hidden_weight, self.hidden_bias))
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(at_least_fp32(h_TD), at_least_fp32(self.out_weight), at_least_fp32(self.out_bias))

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Each expert takes k tokens of the pool (training) or those above its threshold. x_TD [T, D]."""
        score_TE, logit_TE, terms = self.scores(x_TD), self.predict(x_TD), {}
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training:
                choice = self._choose(score_TE.detach(), logit_TE.detach().sigmoid(), S, split)
                token_N, expert_N, taken_TE, kth_E1 = choice
                self.accumulate(kth_E1)
                total = F.binary_cross_entropy_with_logits(logit_TE, taken_TE, reduction="sum")
                terms["capacity"] = sum_and_number(total, taken_TE.numel())
            else:
                token_N, expert_N = self._above_threshold(score_TE, logit_TE.sigmoid())
            weight_N = score_TE.reshape(-1).index_select(0, token_N * self.num_experts + expert_N)
        return Routing(token_N, expert_N, weight_N, 0, terms)

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        return {"capacity": config.capacity_weight}

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """The capacity predictor's loss: its mean over the tokens of the pool and the experts."""
        return {"capacity": mean_over_scope(terms["capacity"], config.scope, all_reduce)}

    def _choose(self, score_TE: Tensor, likely_TE: Tensor, tokens: int, split: Split) -> Choice:
        quota = len(score_TE) * self.config.top_k // self.num_experts
        if self.config.scope == "rank":
            return choose_here(score_TE, likely_TE, quota)
        padding = len(split.label_B) * tokens - len(score_TE)  # null-label images: a rank's number of tokens varies
        mine_PC = F.pad(torch.cat([score_TE, likely_TE], dim=1), (0, 0, 0, padding), value=-1.0)
        pool_PC = self.all_gather(mine_PC)
        if len(pool_PC) == len(mine_PC):  # one rank
            return choose_here(score_TE, likely_TE, quota)
        return choose_in_pool(score_TE, pool_PC, self.config.top_k)

    def _above_threshold(self, score_TE: Tensor, likely_TE: Tensor) -> tuple[Tensor, Tensor]:
        taken_TE = likely_TE > self.threshold.to(likely_TE.dtype)
        if self.config.inference == "pool":
            place_TE = score_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
            taken_TE = place_TE < taken_TE.sum(dim=0)
        token_N, expert_N = taken_TE.nonzero().unbind(1)
        return token_N, expert_N

    def update(self, sums: Tensor) -> None:
        """Thresholds move towards the k-th largest prediction, over ranks and micro-batches; the first sets them."""
        number = sums[-1]
        kth_E = (sums[:-1] / number.clamp(min=1)).to(self.threshold.dtype)
        step = torch.where(self.updates > 0, 1 - self.config.threshold_decay, 1.0) * (number > 0)
        self.threshold.lerp_(kth_E, step.to(kth_E.dtype))
        self.updates.add_(number > 0)
