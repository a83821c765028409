"""What is computed again in the backward pass: gradients against the plain formulation, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op_counting import OperatorCount
from promoe_ds.models.adaln import adaln, residual_adaln
from promoe_ds.moe.dispatch import LocalDispatcher
from promoe_ds.moe.experts import StackedExperts
from promoe_ds.moe.mlp import Mlp, gelu
from promoe_ds.moe.recompute import cast, linear, recomputed, source
from promoe_ds.moe.router import Routing


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def kept(work: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `work` returns, and the tensors that autograd saves meanwhile."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        return work(), saved


def mlp(x: Tensor, shift: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, again: bool) -> Tensor:
    """Two results in a chain, and a third of their inputs; plain, or with what this file tests."""
    r: Any = recomputed if again else lambda function, *inputs: function(*inputs)
    product = linear if again else F.linear
    h = r(adaln, x, shift, scale)
    first, second = h.flatten(0, 1).split([2, h.shape[0] * h.shape[1] - 2])  # views
    y = product(r(gelu, product(torch.cat([first, second]), w1)), w2)
    _, g = r(residual_adaln, x, scale, y.view(x.shape), shift, scale)
    return product(g, w1) + product(first, w1).sum()


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    return draw(2, 3, 4), draw(2, 1, 4, seed=1), draw(2, 1, 4, seed=2), draw(5, 4, seed=3), draw(4, 5, seed=4)


def test_gradients_in_double_precision(inputs: tuple[Tensor, ...]) -> None:
    assert torch.autograd.gradcheck(lambda *args: mlp(*args, again=True), inputs)


@pytest.mark.parametrize("mixed", [False, True])
def test_equal_to_the_bit(inputs: tuple[Tensor, ...], mixed: bool) -> None:
    inputs = tuple(x.detach().float().requires_grad_() for x in inputs)
    results = []
    for again in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = mlp(*inputs, again=again)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs, retain_graph=True)))
        second = torch.autograd.grad(y.float().square().sum(), inputs)  # the graph is still whole
        assert all(map(torch.equal, results[-1][1:], second))
    names = ("y", "x", "shift", "scale", "w1", "w2")
    other = [name for name, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]
    assert set(other) <= {"w1"}, "w1 has three gradients, which may be added in another order"
    torch.testing.assert_close(results[0][4], results[1][4], rtol=0.02 if mixed else 1e-5, atol=1e-4)


def test_keeps_inputs_only() -> None:
    x, w1, w2 = draw(64, 4), draw(8, 4), draw(4, 8)
    _, saved = kept(lambda: linear(recomputed(gelu, linear(recomputed(torch.sin, x), w1)), w2))
    assert sorted(tuple(s.shape) for s in saved) == [(4, 8), (8, 4), (64, 4), (64, 8)]
    _, saved = kept(lambda: linear(cast(recomputed(torch.sin, x), torch.float32), w1.float()))
    assert sorted((tuple(s.shape), s.dtype) for s in saved) == [((8, 4), torch.float32), ((64, 4), torch.float64)]


def test_a_view_is_computed_again_and_what_was_written_to_is_not() -> None:
    h = recomputed(torch.sin, draw(6, 4))
    assert source(h) and source(h[1:3].T) and source(h.view(3, 8))
    assert torch.equal(source(h[1:3].T).again(), h[1:3].T)  # type: ignore[union-attr]
    assert source(h.detach()) is None and source(h * 1) is None and source(torch.ones(2)) is None and source(3) is None
    with torch.no_grad():
        assert source(recomputed(torch.sin, draw(2))) is None
    h.mul_(2)
    assert source(h) is None


def test_who_does_not_know_of_it_keeps_the_result() -> None:
    x, w = draw(6, 4), draw(4, 3)
    y, saved = kept(lambda: recomputed(torch.sin, x) @ w)
    assert any(torch.equal(s, x.sin()) for s in saved)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad((x.sin() @ w).sum(), x)[0])


def test_results_and_inputs_without_gradients() -> None:
    x, y = draw(3), draw(3, seed=1)
    two = recomputed(lambda a, b, n: (a * b.detach() * n, b * n), x, y, 2)
    assert torch.equal(torch.autograd.grad(two[0].sum(), x, retain_graph=True)[0], 2 * y)
    assert torch.autograd.grad(two[0].sum(), y, allow_unused=True)[0] is None
    mixed = recomputed(torch.mul, x, y.detach())
    assert torch.equal(torch.autograd.grad(mixed.sum(), x)[0], y)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@pytest.mark.parametrize("top_k", [1, 2, 0])
def test_experts_keep_hidden_rows_around_gelu_and_results(backend: str, top_k: int) -> None:
    T, D, H, E, K = 32, 16, 48, 3, top_k or 1
    experts = StackedExperts(E, D, H, backend)
    with torch.no_grad():
        for i, p in enumerate(experts.parameters()):
            p.copy_(draw(*p.shape, seed=i))
    token_N = torch.arange(T).repeat_interleave(K)
    routing = Routing(token_N, torch.arange(T * K) % E, draw(T * K, dtype=torch.float32), top_k, {})
    x = draw(T, D, dtype=torch.float32)

    def work() -> Tensor:
        dispatcher = LocalDispatcher(E)
        rows, plan = dispatcher.dispatch(x, routing)
        return dispatcher.combine(experts(rows.wait()), plan).wait()

    y, saved = kept(work)
    own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    storages = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in saved if s.is_floating_point()}
    large = sorted(size for address, size in storages.items() if address not in own and size >= T * D * 4)
    if backend == "grouped_mm":  # the loop keeps as many, expert by expert
        sizes = [T * D * 4, T * K * D * 4, T * K * H * 4, T * K * H * 4]
        assert large == sorted(sizes), "x, results, hidden rows before and after GELU"
    y.square().sum().backward()
    want = torch.zeros(T, D)
    for n, (t, e) in enumerate(zip(token_N.tolist(), routing.expert_N.tolist(), strict=True)):
        b1, b2 = experts.w3[e, 0].split([H, D])
        want[t] += routing.weight_N[n] * F.linear(gelu(F.linear(x[t], experts.w1[e], b1)), experts.w2[e], b2)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    found = [x.grad, experts.w1.grad, experts.w2.grad, experts.w3.grad]
    plain = torch.autograd.grad(want.square().sum(), [x, experts.w1, experts.w2, experts.w3])
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_an_mlp_makes_no_product_and_no_tanh_more() -> None:
    net, x = Mlp(4, 8), recomputed(torch.sin, draw(16, 4, dtype=torch.float32))
    with OperatorCount() as count:
        net(x).sum().backward()
    assert sum(count.names[name] for name in ("mm", "addmm")) == 2 * 3
    assert count.names["gelu"] == 1
