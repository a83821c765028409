"""Explicit guidance: a classifier of superclasses as the router (arXiv:2510.24711, Sec. 4.2, Tab. 1).

The mean token of an image goes through a linear classifier; all tokens of the image go to the expert of the most likely
superclass, with the softmax score of it as gate weight (Eq. (3): G = S where S is largest). Training adds the
cross-entropy to the superclass of the image's label. The superclasses are a file, `promoe_ds.moe.superclasses`; only
training reads it. Null-label images that reach this router (`moe.conditional: false`) are routed, but not classified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.config.option import option
from promoe_ds.config.schema import RouterConfig
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.gates import at_least_fp32
from promoe_ds.moe.losses import Scope, mean_over_scope, sum_and_number
from promoe_ds.moe.router import Reducer, Router, Routing, Tensors, register_router
from promoe_ds.moe.superclasses import assignment, read_superclasses


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RouterConfig):
    superclasses: str | None = option(
        None,
        "a superclass file (format: promoe_ds/moe/superclasses), or `digits` for the built-in one; needed for training",
        change="resume",
    )
    class_weight: float = option(1.0, "weight of the cross-entropy, per MoE layer", at_least=0, change="finetune")
    class_scope: Scope = option(
        "global", "the mean over conditional images: of all ranks, or of each rank, averaged", change="finetune"
    )

    def validate_files(self, config: Any) -> None:
        """The file is there, covers every class, and has one superclass per expert. Raises ConfigError."""
        path, E = "moe.router.superclasses", config.moe.num_experts
        if self.superclasses is None:
            reject(path, "null", "the classification router needs a superclass file", f"add {path}=PATH, or =digits")
        number = len(read_superclasses(self.superclasses, config.model.num_classes))
        if number != E:
            conflict = f"has {number} superclasses, one expert each, but moe.num_experts={E}"
            reject(path, self.superclasses, conflict, f"set moe.num_experts={number} or use another file")


@register_router("classification")
class ClassificationRouter(Router):
    Config = ClassificationConfig

    def __init__(self, config: ClassificationConfig, num_experts: int, width: int):
        super().__init__(config, num_experts, width)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.superclass_C: Tensor | None = None
        """int64, superclass of each class and -1 for the null label; read when first needed"""

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        nn.init.xavier_uniform_(self.weight, generator=generator("weight"))
        nn.init.zeros_(self.bias)

    def macs_per_token(self) -> int:
        return 0  # one product an image

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Route each image as a whole. x_TD [T, D], S tokens per image -> Routing with N = T."""
        with torch.autocast(x_TD.device.type, enabled=False):
            mean_BD = at_least_fp32(x_TD).unflatten(0, (-1, S)).mean(dim=1)
            logit_BE = F.linear(mean_BD, at_least_fp32(self.weight), at_least_fp32(self.bias))
            weight_B, expert_B = logit_BE.softmax(dim=-1).max(dim=-1)
            terms = {}
            if self.training:
                target_B = self.superclasses(x_TD.device).index_select(0, split.label_B[: len(mean_BD)])
                total = F.cross_entropy(logit_BE, target_B, ignore_index=-1, reduction="sum")
                terms["superclass"] = sum_and_number(total, (target_B >= 0).sum())
        token_T = torch.arange(len(x_TD), device=x_TD.device)
        return Routing(token_T, expert_B.repeat_interleave(S), weight_B.repeat_interleave(S), 1, terms)

    @staticmethod
    def aux_loss_weights(config: Any) -> dict[str, float]:
        return {"superclass": config.class_weight}

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """The cross-entropy: its mean over the conditional images of the scope."""
        return {"superclass": mean_over_scope(terms["superclass"], config.class_scope, all_reduce)}

    def superclasses(self, device: torch.device) -> Tensor:
        """int64 [classes + 1] on the device; the last is the null label's, -1. Reads the file once."""
        if self.superclass_C is None or self.superclass_C.device != device:
            assert self.config.superclasses is not None, "validate_data asks for a superclass file before training"
            groups = read_superclasses(self.config.superclasses)
            self.superclass_C = torch.tensor([*assignment(groups), -1], device=device)
        return self.superclass_C
