"""`torch.compile` of the parts of a block whose shapes do not depend on the data, and of the GELUs of those that do.

adaLN, norms and attention are one graph, the dense MLP another. An MoE layer stays eager but for the GELUs of its
experts: products are libraries' work anyway, and the GELUs are most of the rest. `fullgraph=True` makes a graph break
an error, so there are none. Parameters, names and results are those of the plain model, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.models.dit import DiT
from promoe_ds.models.layers import Mlp, gelu
from promoe_ds.moe.experts import StackedExperts


def compile_model(model: DiT, backend: str | Callable[..., Any] = "inductor") -> DiT:
    """Compile in place at the first forward; returns the same object."""
    for block in model.blocks:
        compiled: Any = block
        compiled.attend = torch.compile(compiled.attend, fullgraph=True, backend=backend)
        if compiled.is_moe:
            compile_gelus(compiled.mlp, backend)
        else:
            compiled.feed = torch.compile(compiled.feed, fullgraph=True, backend=backend)
    return model


def compile_gelus(layer: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Compile those of all experts in `layer`, in place; returns the same object."""
    flat_gelu = torch.compile(gelu, fullgraph=True, dynamic=True, backend=backend)

    def activation(x: Tensor) -> Tensor:
        if len(x) < 2:  # torch makes graphs of their own for sizes 0 and 1
            return gelu(x)
        return flat_gelu(x.flatten()).view_as(x)  # one graph for any number of rows and any width

    for module in layer.modules():
        if isinstance(module, Mlp | StackedExperts):
            module.activation = activation
    return layer
