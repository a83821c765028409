"""`torch.compile` of the dense parts of a block: adaLN, norms and attention in one graph, the dense MLP in another.

The MoE layer stays eager: its shapes depend on the data. `fullgraph=True` makes a graph break an error, so there are
none. Parameters, names and results are those of the plain model, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from promoe_ds.models.dit import DiT


def compile_dense_parts(model: DiT, backend: str | Callable[..., Any] = "inductor") -> DiT:
    """Compile in place at the first forward; returns the same object."""
    for block in model.blocks:
        compiled: Any = block
        compiled.attend = torch.compile(compiled.attend, fullgraph=True, backend=backend)
        if not compiled.is_moe:
            compiled.feed = torch.compile(compiled.feed, fullgraph=True, backend=backend)
    return model
