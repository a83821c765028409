"""Token choice and ProMoE's prototypes against a slow float64 loop; balance losses and biases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.config.errors import ConfigError
from promoe_ds.moe.router import aux_losses_of
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.recipes.load import load_config
from tests.moe.routers.loops import D, E, check, edges, losses_of, make, route, same_gradients, split_of, tokens


@pytest.mark.parametrize("top_k", [1, 3])
def test_token_choice(top_k: int) -> None:
    router, x = make("token_choice", top_k=top_k), tokens()
    gate = router.gate
    assert isinstance(gate, Tensor)
    expected, share, mean, x_TD = {}, [0.0] * E, [torch.zeros(()).double()] * E, x.reshape(-1, D)
    for t, token in enumerate(x_TD):
        z = [token @ gate[i] for i in range(E)]
        p = [torch.exp(v) / sum(torch.exp(w) for w in z) for v in z]
        for i in sorted(range(E), key=lambda i: -p[i].item())[:top_k]:
            expected[t, i] = p[i]
            share[i] += 1 / (len(x_TD) * top_k)
        mean = [m + q / len(x_TD) for m, q in zip(mean, p, strict=True)]
    routing = route(router, x, split_of())
    check(routing, expected)
    loss = E * sum(f * P for f, P in zip(share, mean, strict=True))
    ours = losses_of(router, routing)["load_balance"]
    torch.testing.assert_close(ours, loss)
    same_gradients(ours, loss, [x, gate])  # type: ignore[arg-type]


@pytest.mark.parametrize(("activation", "top_k"), [("identity", 1), ("identity", 3), ("sigmoid", 1), ("softmax", 2)])
def test_load_balance_of_prototypes(activation: str, top_k: int) -> None:
    """Table 12: shares P are the softmax of the scores, or the scores themselves where they sum to 1."""
    router, x = make("promoe", activation=activation, top_k=top_k, balance_weight=0.001), tokens()
    P: Any = router.prototypes
    share, mean, x_TD = [0.0] * E, [torch.zeros(()).double()] * E, x.reshape(-1, D)
    for token in x_TD:
        z = torch.stack([token @ p / (token.norm() * p.norm()) for p in P])
        s = {"identity": z, "sigmoid": z.sigmoid(), "softmax": z.softmax(0)}[activation]
        q = [s[i] if activation == "softmax" else s[i].exp() / sum(v.exp() for v in s) for i in range(E)]
        for i in sorted(range(E), key=lambda i: -s[i].item())[:top_k]:  # noqa: B023
            share[i] += 1 / (len(x_TD) * top_k)
        mean = [m + v / len(x_TD) for m, v in zip(mean, q, strict=True)]
    aux = losses_of(router, route(router, x, split_of()))
    loss = E * sum(f * v for f, v in zip(share, mean, strict=True))
    torch.testing.assert_close(aux["load_balance"], loss)
    same_gradients(aux["load_balance"], loss, [x, P])  # type: ignore[arg-type]
    other = make("promoe", activation=activation, top_k=top_k)
    plain = losses_of(other, route(other, x, split_of()))
    assert plain.keys() == {"routing_contrastive"}
    assert torch.equal(plain["routing_contrastive"], aux["routing_contrastive"])


@pytest.mark.parametrize(("activation", "top_k"), [("identity", 1), ("identity", 3), ("sigmoid", 1), ("softmax", 2)])
def test_a_bias_of_prototypes_chooses_and_does_not_weigh(activation: str, top_k: int) -> None:
    router: Any = make("promoe", activation=activation, top_k=top_k, bias_rate=0.5)
    x, bias, expected, moved = tokens(), [0.3, -0.4, 0.0, 0.2], {}, 0
    router.bias.copy_(torch.tensor(bias))
    for t, token in enumerate(x.reshape(-1, D)):
        z = torch.stack([token @ p / (token.norm() * p.norm()) for p in router.prototypes])
        s = {"identity": z, "sigmoid": z.sigmoid(), "softmax": z.softmax(0)}[activation]
        chosen = sorted(range(E), key=lambda i: -(s[i].item() + bias[i]))[:top_k]  # noqa: B023
        moved += set(chosen) != set(s.topk(top_k).indices.tolist())
        expected |= {(t, i): s[i] for i in chosen}
    routing = route(router, x, split_of())
    check(routing, expected)
    assert moved, "the bias matters"
    slow = torch.stack([expected[edge] for edge in edges(routing)]).square().sum()
    same_gradients(routing.weight_N.square().sum(), slow, [x, router.prototypes])


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_the_load_balance_loss_follows_the_scope_and_costs_nothing_at_0(scope: str) -> None:
    def reductions(**options: Any) -> int:
        calls: list[int] = []
        router = make("promoe", contrastive_scope=scope, **options)
        router.all_reduce = lambda v: calls.append(v.numel()) or v
        losses_of(router, route(router, tokens(), split_of()))
        return sum(calls)

    kind = ROUTERS["promoe"]
    columns = (E * (D + 1), E * (D + 2)) if scope == "global" else (0, 0)
    assert (reductions(), reductions(balance_weight=0.5)) == columns
    assert kind.aux_loss_weights(kind.Config()) == {"routing_contrastive": 1.0}
    both = kind.aux_loss_weights(kind.Config(balance_weight=0.5))  # type: ignore[call-arg]
    assert both == {"routing_contrastive": 1.0, "load_balance": 0.5}


@pytest.mark.parametrize(("score", "top_k", "renormalise"), [("sigmoid", 1, False), ("sigmoid", 2, True),
                                                             ("softmax", 3, True)])  # fmt: skip
def test_token_choice_of_today(score: str, top_k: int, renormalise: bool) -> None:
    """Sigmoid scores, renormalised weights, the z-loss, and a bias that counts in the choice and nowhere else."""
    router: Any = make("token_choice", score=score, top_k=top_k, renormalise=renormalise, z_weight=0.1, bias_rate=0.5)
    bias = [0.3, -0.4, 0.0, 0.2]
    router.bias.copy_(torch.tensor(bias))
    x, gate = tokens(), router.gate
    expected, share, mean, z_loss, x_TD = {}, [0.0] * E, [torch.zeros(()).double()] * E, 0.0, x.reshape(-1, D)
    for t, token in enumerate(x_TD):
        z = [token @ gate[i] for i in range(E)]
        partition = sum(torch.exp(v) for v in z)
        s = [torch.exp(v) / partition if score == "softmax" else 1 / (1 + torch.exp(-v)) for v in z]
        chosen = sorted(range(E), key=lambda i: -(s[i].item() + bias[i]))[:top_k]  # noqa: B023
        for i in chosen:
            expected[t, i] = s[i] / sum(s[j] for j in chosen) if renormalise else s[i]
            share[i] += 1 / (len(x_TD) * top_k)
        mean = [m + v / sum(s) / len(x_TD) for m, v in zip(mean, s, strict=True)]
        z_loss = z_loss + torch.log(partition) ** 2 / len(x_TD)
    routing = route(router, x, split_of())
    check(routing, expected)  # type: ignore[arg-type]
    aux = losses_of(router, routing)
    balance = E * sum(f * P for f, P in zip(share, mean, strict=True))
    torch.testing.assert_close(aux, {"load_balance": balance, "z": z_loss})
    probe = torch.linspace(-1, 1, len(routing.weight_N), dtype=torch.float64)
    edge = [expected[pair] for pair in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)]
    ours = (routing.weight_N * probe).sum() + aux["load_balance"] + 0.3 * aux["z"]
    same_gradients(ours, (torch.stack(edge) * probe).sum() + balance + 0.3 * z_loss, [x, gate])
    kind = type(router)
    assert kind.aux_loss_weights(router.config) == {"load_balance": 0.01, "z": 0.1}


@pytest.mark.parametrize("renormalise", [False, True])
def test_sigmoids_that_underflow_leave_numbers(renormalise: bool) -> None:
    """In float32 they are 0 from logits of about -90 downwards. Such a token goes to experts with weights next to 0,
    has no part in the balance and no gradient; one beside it is as ever."""
    router: Any = make("token_choice", score="sigmoid", top_k=2, renormalise=renormalise).float()
    with torch.no_grad():
        router.gate.fill_(1.0)
    for logit in (-86.0, -88.0, -95.0, -160.0, -1e4):
        x: Any = torch.tensor([[logit / D] * D, [0.1] * D], requires_grad=True)
        routing = router(x, 2, split_of([1]))
        weight_TK, share_E = routing.weight_N.view(2, 2), routing.terms["score"]
        assert (weight_TK[0] < 1e-6).all() and share_E.tolist() == pytest.approx([0.25] * E)
        assert weight_TK[1].tolist() == pytest.approx([0.5 if renormalise else 1 / (1 + math.exp(-0.8))] * 2)
        (1e3 * (weight_TK[:, 0].sum() + share_E[0])).backward()
        assert x.grad.isfinite().all() and router.gate.grad.isfinite().all()
    small = router(torch.full((1, D), -40.0 / D), 1, split_of([1]))  # sums of 1e-17 are sums
    assert small.terms["score"].tolist() == pytest.approx([0.25] * E)


@pytest.mark.parametrize("name", ["token_choice", "promoe"])
def test_biases_follow_the_load(name: str) -> None:
    """b_i += rate * sign(mean - load_i), from 0; a bias of 0 chooses as none does; loads even out."""
    router: Any = make(name, bias_rate=0.01)
    plain, x = route(make(name), tokens(), split_of()), tokens()
    routing = route(router, x, split_of())
    assert torch.equal(routing.expert_N, plain.expert_N) and torch.equal(routing.weight_N, plain.weight_N)
    router.after_step(torch.tensor([7.0, 1.0, 4.0, 4.0]))
    assert router.bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0], abs=1e-12)
    router.after_step(torch.tensor([7.0, 1.0, 3.0, 5.0]))
    assert router.bias.tolist() == pytest.approx([-0.02, 0.02, 0.01, -0.01], abs=1e-12)
    router.after_step(None)
    assert router.bias.tolist() == pytest.approx([-0.02, 0.02, 0.01, -0.01], abs=1e-12)
    router, skewed, loads = make(name, bias_rate=0.002), x.detach() + 0.5, []
    for _ in range(400):
        loads.append(torch.bincount(route(router, skewed, split_of()).expert_N, minlength=E).double())
        router.after_step(loads[-1])
    assert loads[0].std() > 6 and loads[-1].std() < 3
    assert not make(name).wants_load and dict(make(name).named_buffers()) == {}


def test_a_weight_that_is_always_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe.router.renormalise=true: with moe.router.top_k=1 every gate weight"):
        load_config("digits_tc", ["moe.router.renormalise=true", "moe.router.top_k=1"])


def test_perfect_balance_costs_one() -> None:
    router = make("token_choice", experts=2)
    with torch.no_grad():
        router.gate.copy_(torch.eye(2, D) * 1e-6)  # type: ignore[operator]
    x = torch.zeros(1, 2, D, dtype=torch.float64)
    x[0, 0, 0] = x[0, 1, 1] = 1.0
    load_2 = torch.tensor([[1, 1]])
    loss_1 = aux_losses_of(router, [route(router, x, split_of([1])).terms], load_2)["load_balance"]
    torch.testing.assert_close(loss_1, torch.ones(1).double())
