"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again.

none        keeps everything
block       keeps the input of each block; the backward pass repeats its forward, exchanges between ranks included
selective   keeps besides: the choice of experts, attention's output, and what arrived from other ranks. Nothing is
            sent twice, and a choice that rounding could turn is not made twice
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT_OPERATORS = frozenset({"max", "topk", "sort"})
"""operators of a choice"""
OWN_OPERATORS = "promoe_ds"
"""namespace of the operators that communicate (`parallel/all_to_all.py`, `parallel/collectives.py`)"""


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = op.name().partition("::")
    name = name.partition(".")[0]
    keep = namespace == OWN_OPERATORS or name in KEPT_OPERATORS or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(block: Callable[..., Any], mode: str, *args: Any) -> Any:
    """`block(*args)` under `train.activation_checkpointing` = mode."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    more = {}
    if mode == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **more)
