"""The one data type between every router and the experts: a list of edges "token n goes to expert m with weight w".

Legend (shape suffixes, here and in every file of this package): B images, S tokens per image, T = B*S tokens,
D width, F expert hidden, E routed experts, e = E/ep local experts, K top-k, N edges, I conditional images.

A router is one file in `routers/`: a subclass of `Router`, registered by `@register_router` (docs/routers.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import ROUTER_CONFIGS, RouterConfig
from promoe_ds.moe.conditional_routing import Split

Tensors = dict[str, Tensor]
"""by name"""


class Routing(NamedTuple):
    """Edges from tokens to experts. A NamedTuple, not a dataclass: ZeRO-3 finds the tensors inside it."""

    token_N: Tensor
    """int64, index of the token, in [0, T)"""
    expert_N: Tensor
    """int64, index of the expert, in [0, E)"""
    weight_N: Tensor
    """float32 (or float64), gate weight, differentiable"""
    top_k: int
    """K if the edges are token-major with exactly K per token (N = T*K), else 0"""
    terms: Tensors
    """what this layer gives to `Router.losses`; tensors of the same shape in every layer; empty outside training"""


Reducer = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """What a sum over ranks is on one device."""
    return x


class Router(nn.Module):
    """Base of all routers. Subclasses implement `forward`, and set `Config` if they have options.

    State that is not trained by gradients is kept in persistent floating-point buffers, equal on every rank: they are
    saved with the EMA weights, restored on resume, and stay fp32 in a bf16 model. Buffers are drawn in `init_weights`
    and change in `update`.
    """

    Config: ClassVar[type[RouterConfig]] = RouterConfig
    one_graph: ClassVar[bool] = False
    """whether `forward` can be a compiled graph: it neither waits for the device nor keeps anything between calls"""
    wants_load: bool = False
    """whether `follow_load` is to be called"""
    all_reduce: Reducer = staticmethod(identity)
    """differentiable sum over the ranks; `parallel.parallelize` sets this and the next"""
    all_gather: Reducer = staticmethod(identity)
    """rows of every rank, in rank order, of a tensor that has the same shape on all; not differentiable"""

    def __init__(self, config: Any, num_experts: int, width: int):
        super().__init__()
        self.config, self.num_experts, self.width = config, num_experts, width
        self._sums: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As in nn.Module (to, bfloat16 ...), but a running state is not rounded to half precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(now.device)
        return self

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Choose experts for tokens.

        Args:
            x_TD: [T, D], image by image; of conditional images only, where the layer splits.
            S: tokens per image, so these are T // S images.
            split: of the whole batch; these images are its first.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    @staticmethod
    def losses(config: Any, terms: Tensors, tokens_per_expert_LE: Tensor, all_reduce: Reducer) -> Tensors:
        """Auxiliary losses of all L MoE layers at once, so that one all-reduce serves them all; in training only.

        Static, because parameters cannot be read here (ZeRO-3 holds them inside their module's forward alone):
        `forward` returns what it takes of them in `terms`.

        Args:
            config: the router's.
            terms: `Routing.terms` of the layers, [L, ...] by name.
            tokens_per_expert_LE: int32 [L, E], edges of this rank.
            all_reduce: differentiable sum over the ranks; called on every rank or on none.

        Returns:
            float32 [L] by name, unweighted, for the names of `aux_loss_weights`.
        """
        return {}

    def init_weights(self, generator: Callable[[str], torch.Generator]) -> None:
        """Draw parameters and buffers; `generator(name)` is keyed by seed and full name."""
        if self.state_dict():
            raise TypeError(f"{type(self).__name__} does not define init_weights")

    def accumulate(self, sums: Tensor) -> None:
        """In a training forward: add to what `update` gets after the step; floating point, one shape on all ranks."""
        self._sums = sums if self._sums is None else self._sums + sums

    def update(self, sums: Tensor) -> None:
        """Change the buffers after an optimizer step, on every rank alike and without gradients.

        Args:
            sums: of what every rank has accumulated since the last step. Recomputation under activation checkpointing
                counts every forward twice, so divide them by a number that they hold.
        """

    def follow_load(self, load_E: Tensor) -> None:
        """Change the buffers after an optimizer step, as `update` does, by the edges that each expert got.

        Args:
            load_E: float32 [E], over all ranks and micro-batches of the step; recomputation is not counted.
        """

    @torch.no_grad()
    def after_step(self, load_E: Tensor | None = None) -> None:
        """Called on every rank after each optimizer step; `load_E` as of `follow_load`, where `wants_load` is set."""
        if load_E is not None and self.wants_load:
            self.follow_load(load_E)
        if self._sums is not None:  # a training forward was made since, on every rank
            self.update(self.all_reduce(self._sums))
            self._sums = None

    def drop_step(self) -> None:
        """Forget what was accumulated: the step made no update."""
        self._sums = None

    def macs_per_token(self) -> int:
        """Multiply-adds of a token; every matrix among parameters and buffers meets it once. Also asked on `meta`."""
        return sum(x.numel() for x in self.state_dict().values() if x.dim() == 2)

    @staticmethod
    def aux_loss_weights(config: RouterConfig) -> dict[str, float]:
        """Weight of each auxiliary loss in the training loss, by name."""
        return {}


def aux_losses_of(router: Router, layers: list[Tensors], tokens_per_expert_LE: Tensor) -> Tensors:
    """`Router.losses` from the `Routing.terms` of each layer, with autocast disabled; {} if there are no terms."""
    terms = {name: torch.stack([terms[name] for terms in layers]) for name in layers[0]}
    with torch.autocast(tokens_per_expert_LE.device.type, enabled=False):
        return router.losses(router.config, terms, tokens_per_expert_LE, router.all_reduce) if terms else {}


ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: make a router known to configurations as `moe.router.name: NAME`.

    `cls.Config` says which options it has; from it the class gets a Config of its own, whose `name` is `name`.

    Raises ConfigError if the name is taken, or if `forward` is missing or takes other arguments.
    """

    def add(cls: type[Router]) -> type[Router]:
        if name in ROUTERS:
            raise ConfigError(f"two routers are named {name!r}: {ROUTERS[name]} and {cls}")
        try:
            if cls.forward is Router.forward:
                raise TypeError("it is not defined")
            inspect.signature(cls.forward).bind("self", "x_TD", "S", "split")
        except TypeError as error:
            wanted = "forward must take (self, x_TD, S, split)"
            raise ConfigError(f"router {name!r} of {cls.__module__}: {wanted}; {error}") from None
        own = [("name", str, name)]
        cls.Config = make_dataclass(f"{cls.__name__}Config", own, bases=(cls.Config,), frozen=True, kw_only=True)
        cls.Config.__module__ = cls.__module__
        ROUTERS[name], ROUTER_CONFIGS[name] = cls, cls.Config
        return cls

    return add
