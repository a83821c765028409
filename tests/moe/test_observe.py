"""Numbers of expert use, against closed forms and loops."""

from __future__ import annotations

import math

import torch

from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.moe import observe
from promoe_ds.moe.router import Router, Routing
from promoe_ds.recipes.load import load_config


def test_load() -> None:
    tokens_per_expert_LE = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert observe.max_over_mean(tokens_per_expert_LE).tolist() == [1, 4, 2, 0]
    assert torch.allclose(observe.load_entropy(tokens_per_expert_LE), torch.tensor([1, 0, 0.5, 0], dtype=torch.float64))
    assert observe.dead_experts(tokens_per_expert_LE).tolist() == [0, 3, 2, 4]
    assert observe.load_entropy(torch.tensor([[7]])).tolist() == [0]  # one expert
    for load in ([0, 0], [5, 0], [0]):
        assert str(observe.load_entropy(torch.tensor([load])).item()) == "0.0", "no minus zero in a log"


def test_prototypes() -> None:
    p_ED = torch.tensor([[3.0, 0, 0], [0, 2, 0], [1, 1, 0]])
    norm, norm_max, cos, cos_max = observe.prototype_statistics(p_ED).tolist()
    assert math.isclose(norm, (5 + math.sqrt(2)) / 3, rel_tol=1e-6) and norm_max == 3
    assert math.isclose(cos, 2 * (2 * math.sqrt(0.5)) / 6, rel_tol=1e-6)
    assert math.isclose(cos_max, math.sqrt(0.5), rel_tol=1e-6)
    assert observe.prototype_statistics(p_ED[:1]).tolist() == [3, 3, 0, 0]
    assert observe.cosines(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]


def test_top_expert_is_the_heaviest_edge() -> None:
    routing = Routing(
        torch.tensor([0, 0, 2, 2]), torch.tensor([1, 3, 2, 0]), torch.tensor([0.2, 0.1, -0.5, -0.1]), 0, {}
    )
    assert observe.top_expert(routing, 4).tolist() == [1, -1, 0, -1]


def tiny(*overrides: str) -> DiT:
    return materialize(build(load_config("tiny", overrides)), 0).eval()


def test_watching_sees_every_router_and_leaves_nothing_behind() -> None:
    model, seen = tiny(), []
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 500.0)

    def see(block: int, router: Router, x_ISD: torch.Tensor, routing: Routing) -> None:
        seen.append((block, tuple(x_ISD.shape), len(routing.token_N)))

    with observe.watching(model, see):
        out = model(x, t, torch.tensor([1, 10, 2])).prediction
    assert seen == [(1, (2, 16, 32), 32), (3, (2, 16, 32), 32)]  # the null-label image goes round the router
    assert torch.equal(model(x, t, torch.tensor([1, 10, 2])).prediction, out) and len(seen) == 2
    assert observe.prototypes_of(observe.routers_of(model)[1]) is not None
    assert observe.prototypes_of(observe.routers_of(tiny("moe.router={name: token_choice}"))[1]) is None
    assert observe.prototypes_of(observe.routers_of(tiny("moe.router={name: kmeans}"))[1]) is not None


def test_last_choice() -> None:
    model, t = tiny(), torch.full((4,), 500.0)
    first, last = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    with observe.LastChoice(model) as choice:
        model(first, t, torch.tensor([1, 2, 10, 10]))
        model(last, t, torch.tensor([1, 2, 10, 10]))
        choice.keep(2)
        model(last[:2], t[:2], torch.tensor([1, 2]))
        choice.keep(1)
    expert_BS = choice.experts_BS()
    assert choice.block == 3 and expert_BS is not None and expert_BS.shape == (3, 16)
    assert (expert_BS[0] == expert_BS[2]).all() and expert_BS.min() >= 0
    with observe.LastChoice(tiny("moe=null")) as choice:
        choice.keep(2)
    assert choice.experts_BS() is None
