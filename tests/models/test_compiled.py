"""torch.compile of the blocks: how many graphs, and that they compute what the plain model does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from promoe_ds.config.errors import ConfigError
from promoe_ds.models import compiled
from promoe_ds.models.compiled import (
    GRAPHS,
    TESTED_TORCH,
    check_compiler,
    compile_gelus,
    compile_model,
    one_graph,
    untested_torch,
    wanted,
)
from promoe_ds.models.dit import DiT, DiTOutput
from promoe_ds.moe import fused
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.mlp import Mlp
from promoe_ds.moe.observe import watching
from promoe_ds.moe.router import Routing
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.moe.weight_casts import cast_once
from promoe_ds.recipes.load import load_config
from tests.launch import CXX, ROOT
from tests.models.test_dit import awake

pytestmark = pytest.mark.slow  # tracing and compiling take minutes

NULL = 10
BATCHES = (
    [1, 3, 5, 7, 9],
    [NULL, 3, 5, 7, 9],
    [NULL, NULL, 5, 7, 9],
    [NULL] * 4 + [9],
    [NULL] * 5,
    [1, 2, NULL, 4, 5, 6],
)
"""labels: none without one, one, some, all but one, all; and another size"""

ONE_GRAPH = sorted(name for name, router in ROUTERS.items() if router.one_graph)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert not torch._dynamo.utils.counters["graph_break"]


def model_of(*overrides: str) -> DiT:
    return awake(load_config("tiny", ["model.depth=2", *overrides]))


def step(model: DiT, labels: list[int], mixed: bool = False) -> tuple[DiTOutput, dict[str, Tensor]]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(len(labels), 1, 8, 8, generator=generator), torch.rand(len(labels), generator=generator) * 1000
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(x, t, torch.tensor(labels))
    (out.prediction.float().square().mean() + sum(v.sum() for v in out.aux_losses.values())).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, grads


def same(model: DiT, compiled: DiT, labels: list[int], mixed: bool = False) -> None:
    (want, want_grads), (found, found_grads) = step(model, labels, mixed), step(compiled, labels, mixed)
    assert found_grads.keys() == want_grads.keys()
    if mixed:  # bf16 rounds elsewhere, after which a token may go elsewhere
        torch.testing.assert_close(found.prediction, want.prediction, rtol=0.05, atol=0.01)
        return
    torch.testing.assert_close(found.prediction, want.prediction, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.tokens_per_expert_LE, want.tokens_per_expert_LE)
    scale = max(float(grad.norm()) for grad in want_grads.values())
    for name, grad in want_grads.items():
        assert float((found_grads[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-7 * scale, name


def calls_in_forwards(graph: torch.fx.GraphModule) -> dict[str, bool]:
    """What the forwards of the graph's autograd functions call, and whether torch 2.11 then loses their gradients: it
    does if a call writes to what it is given, and if one that may return what it is given makes the result."""
    applied = [n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "autograd_function_apply"]
    nodes = [n for apply in applied for n in graph.get_submodule(apply.args[0].target).graph.nodes]
    results = [x for n in nodes if n.op == "output" for x in n.all_input_nodes]
    calls = [(getattr(n.target, "__name__", n.target), n) for n in nodes if n.op.startswith("call_")]
    idle = {name for name, n in calls if name in ("to", "contiguous") and n in results}
    return {name: bool(re.search("[^_]_$", name)) or "out" in n.kwargs or name in idle for name, n in calls}


class Counting:
    """A backend that counts the graphs and runs them as they are, or as a compiler would get them (`lowered`)."""

    def __init__(self, lowered: bool = False) -> None:
        self.lowered = lowered
        self.attentions: list[int] = []
        """in each graph"""
        self.in_forwards: dict[str, bool] = {}

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.attentions.append(sum(n.name.startswith("scaled_dot_product") for n in graph.graph.nodes))
        self.in_forwards.update(calls_in_forwards(graph))
        return aot_eager(graph, example) if self.lowered else graph.forward


@pytest.mark.parametrize("router", ONE_GRAPH)
def test_a_block_is_one_graph(router: str) -> None:
    """Blocks share graphs; other numbers of labelled images need few more, and the model stays the same.

    One router has dense blocks beside it, whose graphs are those of all.
    """
    shape = ("model.depth=4",) if router == "promoe" else ("model.depth=2", "moe.layers=all")
    backend, overrides = Counting(), (f"moe.router.name={router}", *shape)
    plain, compiled = model_of(*overrides), compile_model(model_of(*overrides), backend)
    same(plain, compiled, BATCHES[1])
    assert backend.attentions == [1] * (1 + (router == "promoe")), "one for the dense blocks, one for the MoE blocks"
    for labels in BATCHES:
        same(plain, compiled, labels)
    assert set(backend.attentions) == {1} and len(backend.attentions) < GRAPHS // 4, "whole blocks, and few"
    assert "index_select" in backend.in_forwards, "of the permutation"
    lossy = [name for name, loses in backend.in_forwards.items() if loses]
    assert not lossy, "torch 2.11 loses the gradients"


@pytest.mark.parametrize(
    "override", ["moe.router.name=kmeans", "moe.router.name=diffmoe", "moe.experts_backend=loop", "parts", "moe=null"]
)
def test_other_blocks_are_compiled_in_parts(override: str) -> None:
    overrides = () if override == "parts" else (override,)
    backend = Counting()
    torch._functorch.config.donated_buffer = True
    plain, compiled = model_of(*overrides), compile_model(model_of(*overrides), backend, whole=override != "parts")
    for labels in BATCHES[1:4]:
        same(plain, compiled, labels)
    layers = [block.mlp for block in compiled.blocks]
    whole = [not isinstance(mlp, MoELayer) or (override != "parts" and one_graph(mlp)) for mlp in layers]
    assert whole == ([True, True] if override == "moe=null" else [True, False])
    assert not torch._functorch.config.donated_buffer, "the settings hold for parts too"


def test_lowered_graphs_compute_the_same() -> None:
    """Forward and backward as a compiler gets them; with autocast, and with blocks computed again.

    Gradients arrive in one order whatever the labels: ZeRO-2 fills buckets in this order, and ranks with other orders
    would add up strangers.
    """
    plain, compiled = model_of(), compile_model(model_of(), Counting(lowered=True))
    orders: list[list[str]] = []
    for name, p in compiled.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: orders[-1].append(name))
    for labels in BATCHES:
        orders.append([])
        same(plain, compiled, labels)
    assert orders[0] and all(found == orders[0] for found in orders)
    same(plain, compiled, BATCHES[1], mixed=True)
    same(plain, compile_model(model_of("train.activation_checkpointing=block"), Counting(lowered=True)), BATCHES[1])


class Inputs:
    """A backend that runs a graph as a compiler would get it, and keeps which floats each one with attention got."""

    def __init__(self) -> None:
        self.given: list[list[Tensor]] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        run = aot_eager(graph, example)
        if not any(node.name.startswith("scaled_dot_product") for node in graph.graph.nodes):
            return run

        def call(*args: Any) -> Any:
            self.given.append([x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.dim()])
            return run(*args)

        return call


def accumulated(model: DiT, labels: list[int], times: int) -> dict[str, Tensor]:
    """Gradients of several micro-batches under autocast."""
    with cast_once():
        for seed in range(times):
            x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x, torch.full((len(labels),), 500.0), torch.tensor(labels))
            (out.prediction.float().square().mean() + sum(v.sum() for v in out.aux_losses.values())).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("override", ["moe.router.name=promoe", "moe.router.name=kmeans", "moe=null"])
def test_graphs_get_weights_that_are_cast_once(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks and parts; losses and gradients are those of graphs that cast by themselves, to the bit."""
    backend, model, other = Inputs(), model_of(override), model_of(override)
    found = accumulated(compile_model(model, backend), BATCHES[1], 3)
    casts = [call for call in backend.given if any(x.dtype == torch.bfloat16 for x in call)]
    assert len(casts) == len(backend.given) == 3 * len(model.blocks), "no graph has all weights in fp32"
    addresses = [sorted(x.data_ptr() for x in call if x.dtype == torch.bfloat16 and x.requires_grad) for call in casts]
    assert addresses[: len(model.blocks)] == addresses[-len(model.blocks) :], "one copy for all micro-batches"
    wide = {tuple(x.shape) for call in casts for x in call if x.dtype == torch.float32 and x.requires_grad}
    matrices = {tuple(p.shape) for n, p in model.blocks.named_parameters() if n.endswith(("weight", "w1", "w2"))}
    assert not wide & matrices, "no product is given fp32 weights"
    assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for p in model.parameters())

    monkeypatch.setattr(compiled, "products", lambda module: [])
    torch._dynamo.reset()
    wanted = accumulated(compile_model(other, Inputs()), BATCHES[1], 3)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.equal(found[name], grad), name


def test_weights_that_take_any_gradient_get_what_graphs_return() -> None:
    """Of products, in bf16."""
    gradients = []
    for any_dtype in (False, True):
        torch._dynamo.reset()
        model = compile_model(model_of("moe.router.name=promoe"), aot_eager)
        for p in model.parameters() if any_dtype else ():
            p.grad_dtype = None
        gradients.append(accumulated(model, BATCHES[1], 1))
    wide, given = gradients
    half = [name for name, grad in given.items() if grad.dtype == torch.bfloat16]
    assert {name for name in wide if "blocks" in name and name.endswith(("fc1.weight", "qkv.weight", ".w1"))} <= {*half}
    for name, grad in wide.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, given[name].float()), name


def test_whoever_watches_sees_the_routers_of_a_compiled_model() -> None:
    model = compile_model(model_of(), Counting())
    step(model, BATCHES[1])
    seen: list[int] = []

    def see(block: int, router: Any, x_ISD: Tensor, routing: Routing) -> None:
        seen.append(len(routing.expert_N))

    with watching(model, see):
        step(model, BATCHES[1])
    assert seen == [4 * 16]


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.parametrize("router", ONE_GRAPH)
def test_a_real_compiler_computes_the_same(router: str) -> None:
    """inductor, whose generated code has cost gradients before (`_settings`, `top_tokens_per_image`)."""
    overrides = f"moe.router.name={router}", "model.depth=1", "moe.layers=all"
    same(model_of(*overrides), compile_model(model_of(*overrides)), BATCHES[1])


def test_the_tested_versions_are_those_of_the_page() -> None:
    page = (ROOT / "benchmarks/results/stacks.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\| torch (\d+\.\d+)\.", page, re.M))) == list(TESTED_TORCH)
    for version in TESTED_TORCH:
        assert untested_torch(f"{version}.1+cu130") is None
    said = untested_torch("2.1.0")  # no prefix of a tested one
    assert said and "never tested on torch 2.1, but on 2.11" in said and "\n" not in said


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config("tiny", ["train.compile=true"])
    with pytest.raises(ConfigError, match=r"compile=true: on a CPU .* no no-such-compiler; install g\+\+"):
        check_compiler(config, "cpu")
    check_compiler(config, "cuda")
    check_compiler(load_config("tiny"), "cpu")


def test_nothing_compiles_by_default_until_a_gpu_has_shown_that_gradients_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`BY_DEFAULT` is the one place; where it is on, it gives way to what it does not work with."""
    default = load_config("tiny")
    assert not wanted(default, "cuda", 0) and not wanted(default, "cpu", 0)
    monkeypatch.setattr(compiled, "BY_DEFAULT", ("cuda",))
    assert wanted(default, "cuda", 2) and not wanted(default, "cuda", 3) and not wanted(default, "cpu", 0)
    assert not wanted(load_config("tiny", ["train.compile=false"]), "cuda", 0)
    assert not wanted(load_config("tiny", ["train.activation_checkpointing=selective"]), "cuda", 0)
    assert wanted(load_config("tiny", ["train.compile=true"]), "cpu", 0)


def test_compiled_gelus_are_few_graphs_whatever_the_rows() -> None:
    """All layers and ranks share torch's limit of graphs a function, and reaching it would end the training."""
    backend = Counting()
    layer = compile_gelus(Mlp(4, 8), backend)
    for grad in (True, False):
        for mixed in (False, True):
            for rows in (5, 0, 1, 9):
                with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    x = torch.randn(rows, 8, requires_grad=grad)
                    found = layer.activation(x * 1)  # type: ignore[operator]
                torch.testing.assert_close(found, torch.nn.functional.gelu(x, approximate="tanh"))
    assert len(backend.attentions) == 4, "a graph with and without gradients, with and without autocast"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_operators_of_the_kernels_give_the_plain_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residual and adaLN as on CUDA, by the operators' plain version: without a compiler, and in its graphs."""
    plain, other = model_of(), model_of()
    wanted = [step(plain, labels) for labels in BATCHES[:2]]
    mixed = step(plain, BATCHES[1], mixed=True)[0].prediction
    monkeypatch.setattr(fused, "fusible", lambda _: True)
    if backend != "eager":
        compile_model(other, backend)
    for labels, (want, want_grads) in zip(BATCHES[:2], wanted, strict=True):
        found, grads = step(other, labels)
        torch.testing.assert_close(found.prediction, want.prediction, rtol=1e-4, atol=1e-5)
        scale = max(float(grad.norm()) for grad in want_grads.values())
        assert grads.keys() == want_grads.keys()
        for name, grad in want_grads.items():
            assert float((grads[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-7 * scale, name
    found = step(other, BATCHES[1], mixed=True)[0]  # the router sees the norm in fp32, of images with a label
    torch.testing.assert_close(found.prediction, mixed, rtol=0.05, atol=0.01)
