"""`torch.compile` of a model's blocks.

A block is one graph wherever it can be: a dense block, and an MoE block whose experts are all here and whose router
can be one (`Router.one_graph`). Of another MoE block (rows travel, or counts are read on the host) adaLN, norms and
attention are one graph and the experts' GELUs another; the rest stays eager. `fullgraph=True` makes a graph break an
error, so there are none. Parameters, names and results are those of the plain model, but for rounding. Weights of
products are cast before a graph is called (`moe/weight_casts.py`).

No other file replaces a function of a module. Whoever looks on uses hooks, which a graph does not call: one who looks
for a while has the model run eagerly (`moe.observe.hooked`), and the meter refuses experts inside a graph.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT
from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.experts import BACKENDS, StackedExperts, grouped
from promoe_ds.moe.layer import MoELayer, RoutedExperts
from promoe_ds.moe.mlp import Mlp, gelu
from promoe_ds.moe.router import Router
from promoe_ds.moe.weight_casts import copies_in_place

BY_DEFAULT: tuple[str, ...] = ()
"""kinds of device on which `train.compile=null` compiles. "cuda" comes in once the smoke stage of `make bench-gpu` has
found compiled gradients right on one; a CPU gains too little for the minutes that compiling takes"""
GRAPHS = 64
"""of one function; torch stops at 8. An MoE block needs one each for none, one, some and all but one without label"""
TESTED_TORCH = "2.11", "2.13", "2.15"
"""versions whose gradients were compared with those of the plain model: benchmarks/results/stacks.md"""


def compile_model(
    model: DiT, backend: str | Callable[..., Any] = "inductor", whole: bool = True, frozen: bool = False
) -> DiT:
    """Compile in place at the first forward; returns the same object.

    Args:
        model: on its device, sharded or not.
        backend: of torch.compile.
        whole: whether an MoE block may become one graph; if not, its experts can be timed.
        frozen: weights are constants of the graphs, held once more as a CPU's products read them; for inference.
    """
    _settings()
    if frozen:
        import torch._inductor.config as inductor

        inductor.freezing = True  # looked at when a graph is compiled, with no gradients asked for
    for block in model.blocks:
        compiled: Any = block
        if not isinstance(compiled.mlp, MoELayer) or (whole and one_graph(compiled.mlp)):
            compile_whole(compiled, backend)
        else:
            attend = torch.compile(compiled.attend, fullgraph=True, backend=backend)
            compiled.attend = _on_copies(attend, compiled.attn, compiled.adaLN)
            compile_gelus(compiled.mlp, backend)
    return model


def wanted(config: Config, device: str, stage: int) -> bool:
    """Whether to compile on this kind of device at this ZeRO stage: as asked for; if not asked, by `BY_DEFAULT`, where
    it works."""
    if config.train.compile is not None:
        return config.train.compile
    return device in BY_DEFAULT and stage < 3 and config.train.activation_checkpointing != "selective"


def check_compiler(config: Config, device: str) -> None:
    """Raise ConfigError if the model is to be compiled for a CPU, and there is no C++ compiler."""
    if config.train.compile:
        require_compiler(device, "train.compile", "install g++, name another in CXX, or set train.compile=false")


def require_compiler(device: str, option: str, way_out: str) -> None:
    """Raise ConfigError, naming `option`, if torch.compile cannot work on this kind of device."""
    command = (os.environ.get("CXX") or "g++").split()[0]
    if device == "cpu" and shutil.which(command) is None:
        conflict = f"on a CPU torch.compile calls a C++ compiler, and there is no {command}"
        reject(option, "true", conflict, way_out)


def untested_torch(version: str = torch.__version__) -> str | None:
    """A line to say where this version's compiler was never tested; None where it was."""
    minor, tested = ".".join(version.split(".")[:2]), ", ".join(TESTED_TORCH)
    if minor in TESTED_TORCH:
        return None
    way_out = "compare the losses with those of train.compile=false"
    return f"warning: train.compile was never tested on torch {minor}, but on {tested}: {way_out}"


def compile_whole(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Make the forward of a block, or of an MoE layer, one graph, in place; returns the same object.

    Without conditional images an MoE layer's graph is run as it was traced, because the compiler knows no empty index.
    Not eagerly: gradients would arrive in another order than on the other ranks, and ZeRO-2 fills its buckets by it.
    """
    _settings()
    compiled, traced = (torch.compile(module.forward, fullgraph=True, backend=b) for b in (backend, "aot_eager"))
    stacks = [m for m in module.modules() if isinstance(m, StackedExperts)]
    for experts in stacks:
        experts.backends = BACKENDS | {"grouped_mm": grouped}

    def forward(*args: Any) -> Any:
        split = next(x for x in args if isinstance(x, Split))
        return (compiled if split.num_conditional else traced)(*args)

    module.forward = _on_copies(forward if stacks else compiled, module)
    return module


def _on_copies(graph: Callable[..., Any], *modules: nn.Module) -> Callable[..., Any]:
    """`graph`, called while the weights of products in `modules` are their copies."""
    layers = [layer for module in modules for layer in products(module)]
    places = [(layer, name) for layer in layers for name, _ in layer.named_parameters(recurse=False)]

    def call(*args: Any) -> Any:
        with copies_in_place(places):
            return graph(*args)

    return call


def products(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that cast under autocast; a router's see to their precision themselves."""
    if isinstance(module, nn.Linear | StackedExperts):
        yield module
    elif not isinstance(module, Router):
        for child in module.children():
            yield from products(child)


def _settings() -> None:
    """Of the compiler, for the whole process. All but the first and the last keep gradients right (torch 2.13.0)."""
    import torch._dynamo.config as dynamo  # half a second, for those who compile
    import torch._functorch.config as autograd
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
    # Else memory of a tensor kept for the backward pass is written to while another view of it is still to be read.
    autograd.donated_buffer = False
    # Else the gradients of our own autograd functions are computed under autocast, a router's prototypes' in bf16.
    autograd.backward_pass_autocast = "off"
    # Loses gradients of adaLN's chunks on CUDA: https://github.com/pytorch/pytorch/pull/193103
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    # Else what products of experts return is kept with its bias added, in a tensor of its own that is written for it.
    autograd.ban_recompute_used_far_apart = False


def one_graph(layer: MoELayer) -> bool:
    """Whether nothing in the layer's forward communicates or waits for the device."""
    routed = layer.routed
    return layer.router.one_graph and isinstance(routed, RoutedExperts) and routed.experts.backend == "grouped_mm"


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
