"""The one data type between every router and the experts: a list of edges "token n goes to expert m with weight w".

Legend (shape suffixes, here and in every file of this package): B images, S tokens an image, T = B*S tokens,
D width, F expert hidden, E routed experts, e = E/ep local experts, K top-k, N edges, I conditional images.

A router is one file in `routers/`: a subclass of `Router` with a nested `Config`, registered by `@register_router`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from promoe_ds.config.schema import ROUTER_CONFIGS, Config, ConfigError, RouterConfig, reject


class Routing(NamedTuple):
    """Edges from tokens to experts. A NamedTuple, not a dataclass: ZeRO-3 finds the tensors inside it."""

    token_N: Tensor
    """int64, index of the token, in [0, T)"""
    expert_N: Tensor
    """int64, index of the expert, in [0, E)"""
    weight_N: Tensor
    """float32 (or float64), gate weight, differentiable"""
    top_k: int
    """K if the edges are token-major with exactly K a token (N = T*K), else 0"""
    terms: dict[str, Tensor]
    """what this layer gives to `Router.losses`; tensors of the same shape in every layer; empty outside training"""


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class RoutingContext:
    """What the host knows of a batch before the forward pass: which images are conditional, and how to sum over ranks.

    The model works on images in the order "conditional first, null-label after", so that conditional routing
    (Sec. 4.1 of the paper) is a slice: no mask, no copy, no device synchronisation in any layer.
    """

    label_B: Tensor
    """int64 on the device, in the model's order"""
    order_B: Tensor
    """int64 on the device: the model's order from the caller's"""
    restore_B: Tensor
    """int64 on the device: the caller's order from the model's"""
    num_conditional: int
    """I: the first I images of the model's order carry a real label"""
    row_B: Tensor
    """int64 on the device, in the model's order: the image's place in the global batch"""
    all_reduce: Callable[[Tensor], Tensor] = identity
    """differentiable sum over the data-parallel ranks (identity on one device)"""
    all_gather: Callable[[Tensor], Tensor] = identity
    """rows of every rank, in rank order, of a tensor that has the same shape on all; not differentiable"""

    @staticmethod
    def build(
        label_B: Tensor,
        null_label: int,
        device: torch.device | str,
        all_reduce: Callable[[Tensor], Tensor] = identity,
        all_gather: Callable[[Tensor], Tensor] = identity,
        row_B: Tensor | None = None,
    ) -> RoutingContext:
        """Split a batch by label.

        Args:
            label_B: int64 [B] on the CPU (labels are dropped on the host, so the split costs no synchronisation).
            null_label: the label of classifier-free guidance's unconditional images.
            device: where the model runs.
            all_reduce: differentiable sum over ranks, for losses of global scope.
            all_gather: rows of all ranks, for choices that look at the whole batch.
            row_B: int64 [B] on the CPU, places in the global batch; 0..B-1 if not given.
        """
        null_B = label_B == null_label
        order_B = torch.argsort(null_B.to(torch.uint8), stable=True)
        restore_B = torch.empty_like(order_B)
        restore_B[order_B] = torch.arange(len(order_B))
        row_B = torch.arange(len(label_B)) if row_B is None else row_B
        host = (label_B[order_B], order_B, restore_B, row_B[order_B])
        if torch.device(device).type == "cuda":  # only from pinned memory does the host not wait for the copy
            label_B, order_B, restore_B, row_B = (x.pin_memory().to(device, non_blocking=True) for x in host)
        else:
            label_B, order_B, restore_B, row_B = (x.to(device) for x in host)
        return RoutingContext(label_B, order_B, restore_B, int((~null_B).sum()), row_B, all_reduce, all_gather)


class Router(nn.Module):
    """Base of all routers. Subclasses set `Config` and implement `forward`.

    State that is not trained by gradients is kept in persistent floating-point buffers, equal on every rank: they are
    saved with the EMA weights, restored on resume, and stay fp32 in a bf16 model. Buffers are drawn in `init_weights`
    and change in `after_step`.
    """

    Config: ClassVar[type[RouterConfig]] = RouterConfig
    one_graph: ClassVar[bool] = False
    """whether `forward` can be a compiled graph: it neither waits for the device nor keeps anything between calls"""

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As in nn.Module (to, bfloat16 ...), but a running state is not rounded to half precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(now.device)
        return self

    def forward(self, x_TD: Tensor, S: int, ctx: RoutingContext) -> Routing:
        """Choose experts for tokens.

        Args:
            x_TD: [T, D], image by image; of conditional images only, where the layer splits.
            S: tokens an image, so these are T // S images.
            ctx: of the whole batch; these images are its first.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def losses(self, terms: dict[str, Tensor], load_LE: Tensor, ctx: RoutingContext) -> dict[str, Tensor]:
        """Auxiliary losses of all L MoE layers at once, so that one all-reduce serves them all.

        Called on the first layer's router, after the last block, in training only. Parameters must not be read here
        (ZeRO-3 holds them inside their module's forward alone): `forward` returns what it takes of them in `terms`.

        Args:
            terms: `Routing.terms` of the layers, [L, ...] by name.
            load_LE: int32 [L, E], edges of this rank.

        Returns:
            float32 [L] by name, unweighted, for the names of `aux_weights`.
        """
        return {}

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """Draw the router's parameters; `generator(parameter_name)` is keyed by seed and full name."""
        raise TypeError(f"{type(self).__name__} does not define init_weights")

    def after_step(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Update the buffers; called on every rank after each optimizer step, without gradients.

        Args:
            all_reduce: sum over ranks, to be called on every rank or on none.
        """

    def drop_step(self) -> None:
        """Forget what the forwards since the last step gathered for `after_step`: the step made no update."""

    @staticmethod
    def num_parameters(config: RouterConfig, num_experts: int, width: int) -> int:
        """Parameters of one router, from the configuration alone; buffers do not count."""
        raise TypeError("the router does not define num_parameters")

    @classmethod
    def macs_per_token(cls, config: RouterConfig, num_experts: int, width: int) -> int:
        """Multiply-adds of one router a token; by default every parameter is used once."""
        return cls.num_parameters(config, num_experts, width)

    @staticmethod
    def aux_weights(config: RouterConfig) -> dict[str, float]:
        """Weight of each auxiliary loss in the training loss, by name."""
        return {}


def auxiliary_losses(
    router: Router, layers: list[dict[str, Tensor]], load_LE: Tensor, ctx: RoutingContext
) -> dict[str, Tensor]:
    """`Router.losses` from the `Routing.terms` of each layer, with autocast disabled; {} if there are no terms."""
    terms = {name: torch.stack([terms[name] for terms in layers]) for name in layers[0]}
    with torch.autocast(load_LE.device.type, enabled=False):
        return router.losses(terms, load_LE, ctx) if terms else {}


ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: make a router known to configurations as `moe.router.name: NAME`.

    Raises ConfigError if the name is taken or is not its Config's, or if `forward` takes other arguments.
    """

    def add(cls: type[Router]) -> type[Router]:
        if name in ROUTERS:
            raise ConfigError(f"two routers are named {name!r}: {ROUTERS[name]} and {cls}")
        if cls.Config.__dataclass_fields__["name"].default != name:
            conflict = f"set Config to a class of its own, with name: str = {name!r}"
            raise ConfigError(f"router {name!r} of {cls.__module__}: {conflict}")
        try:
            inspect.signature(cls.forward).bind("self", "x_TD", "S", "ctx")
        except TypeError as error:
            wanted = "forward must take (self, x_TD, S, ctx)"
            raise ConfigError(f"router {name!r} of {cls.__module__}: {wanted}; {error}") from None
        ROUTERS[name], ROUTER_CONFIGS[name] = cls, cls.Config
        return cls

    return add


def at_least_fp32(x: Tensor) -> Tensor:
    """Scores and losses are computed in fp32 whatever the autocast; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def top_experts(score_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Token choice: the K experts of highest score of each token -> (weight_N, expert_N), N = T*K, token by token."""
    if top_k == 1:
        weight_T, expert_T = score_TE.max(dim=-1)  # several times faster than topk on a CPU
        return weight_T, expert_T
    weight_TK, expert_TK = score_TE.topk(top_k, dim=-1)
    return weight_TK.view(-1), expert_TK.view(-1)


def expert_major(token_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of an expert choice: int64 [E, n], the tokens taken by each expert -> (token_N, expert_N), N = E*n."""
    expert_E = torch.arange(len(token_EN), device=token_EN.device)
    return token_EN.reshape(-1), expert_E.repeat_interleave(token_EN.shape[1])


def top_tokens_per_image(score_BSE: Tensor, quota: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert choice within each image: every expert takes its `quota` tokens of highest score.

    Returns:
        (token_N int64, expert_N int64, score_N), N = E*B*quota, expert by expert.
    """
    B, S, E = score_BSE.shape
    # Permuted after the choice: before it, torch 2.13's compiler computes wrong gradients of a softmax (on CPU).
    score_EBk, position_EBk = (x_BkE.permute(2, 0, 1) for x_BkE in score_BSE.topk(quota, dim=1))
    first_B = torch.arange(B, device=score_BSE.device) * S
    token_N, expert_N = expert_major((position_EBk + first_B[:, None]).reshape(E, B * quota))
    return token_N, expert_N, score_EBk.reshape(-1)


# ----------------------------------------------------------------------------------------- checks of a router's Config


def check_top_k(router: Any, config: Config) -> None:
    """`top_k` lies in 1..E. Raises ConfigError."""
    assert config.moe is not None
    if not 1 <= router.top_k <= config.moe.num_experts:
        limit = f"is not in 1..moe.num_experts={config.moe.num_experts}"
        reject("moe.router.top_k", router.top_k, limit, "lower it" if router.top_k > 0 else "raise it")


def check_quota(router: Any, config: Config, images: int, pool: str) -> None:
    """An expert that chooses among the tokens of `images` images takes at least one. Raises ConfigError."""
    assert config.moe is not None
    E, tokens = config.moe.num_experts, images * config.model.tokens
    if tokens * router.top_k < E:
        conflict = f"an expert's quota of {pool} is {tokens} tokens * top_k={router.top_k} // {E} experts = 0"
        reject(
            "moe.num_experts", E, conflict, f"lower it to at most {tokens * router.top_k}, or raise moe.router.top_k"
        )


def images_a_forward(config: Config) -> int:
    """Images in a forward pass of one process alone: what is sure before the number of processes is known."""
    return config.train.micro_batch_size or config.train.global_batch_size
