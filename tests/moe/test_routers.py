"""Each router against a slow float64 loop written from its equations; what the contract cannot say of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.config.schema import ConfigError
from promoe_ds.moe.router import Router, Routing, aux_losses_of
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.moe.routers.diffmoe import choose_here, choose_in_pool
from promoe_ds.moe.split import Split, split_by_label
from promoe_ds.recipes.load import load_config

D, S, E, NULL = 8, 12, 4, 10
LABELS = [3, 1, 9, 3, 0]


def make(name: str, experts: int = E, **options: Any) -> Router:
    kind = ROUTERS[name]
    router = kind(kind.Config(**options), experts, D).double()  # type: ignore[call-arg]
    with torch.no_grad():
        router.init_weights(lambda key: torch.Generator().manual_seed(len(key)))
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64) / 2)
    return router


def tokens(images: int = len(LABELS), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, S, D, generator=generator, dtype=torch.float64).requires_grad_()


def split_of(labels: list[int] = LABELS, **options: Any) -> Split:
    return split_by_label(torch.tensor(labels), NULL, "cpu", **options)


def losses_of(router: Router, routing: Routing) -> dict[str, Tensor]:
    """The auxiliary losses of one router alone, scalars."""
    load_1E = torch.bincount(routing.expert_N, minlength=E)[None]
    return {name: loss_L.squeeze(0) for name, loss_L in aux_losses_of(router, [routing.terms], load_1E).items()}


def route(router: Router, x_BSD: Tensor, split: Split) -> Routing:
    return router(x_BSD.flatten(0, 1), x_BSD.shape[1], split)


def edges(routing: Routing) -> dict[tuple[int, int], Tensor]:
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)
    return dict(zip(pairs, routing.weight_N, strict=True))


def check(routing: Routing, expected: dict[tuple[int, int], Tensor]) -> None:
    found = edges(routing)
    assert found.keys() == expected.keys()
    for edge, weight in expected.items():
        torch.testing.assert_close(found[edge], weight, rtol=1e-12, atol=1e-12)


def same_gradients(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    for a, b in zip(*(torch.autograd.grad(v, inputs, allow_unused=True) for v in (ours, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- token choice


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


# -------------------------------------------------------------------------------------------------------- expert choice


def per_image_choice(x: Tensor, score: Any, quota: int) -> dict[tuple[int, int], Tensor]:
    """Loop over images and experts: the `quota` tokens with the highest `score(token, expert)`."""
    expected = {}
    for b, image in enumerate(x):
        for i in range(E):
            scores = [score(token, i) for token in image]
            for s in sorted(range(S), key=lambda s: -scores[s].item())[:quota]:
                expected[b * S + s, i] = scores[s]
    return expected


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_choice(top_k: int) -> None:
    router, x = make("expert_choice", top_k=top_k), tokens()
    softmax = lambda token, i: (router.gate @ token).softmax(0)[i]  # noqa: E731
    check(route(router, x, split_of()), per_image_choice(x, softmax, S * top_k // E))


@pytest.mark.parametrize("top_k", [1, 2])
def test_promoe_expert_choice(top_k: int) -> None:
    router, x, tau = make("promoe_ec", top_k=top_k, temperature=0.3), tokens(), 0.3
    P: Any = router.prototypes
    cosine = lambda token, i: token @ P[i] / (token.norm() * P[i].norm())  # noqa: E731, Eq. (4)
    expected = per_image_choice(x, cosine, S * top_k // E)
    routing = route(router, x, split_of())
    check(routing, expected)
    loss = torch.zeros(()).double()
    for b in range(len(x)):  # Eq. (6) within the image
        m = [torch.stack([x[b, t - b * S] for t, j in expected if j == i and t // S == b]).mean(0) for i in range(E)]
        for i in range(E):
            sim = torch.stack([F.cosine_similarity(P[i], m[j], dim=0) for j in range(E)]) / tau
            loss = loss - (sim[i] - torch.logsumexp(sim, 0)) / (len(x) * E)
    ours = losses_of(router, routing)["routing_contrastive"]
    torch.testing.assert_close(ours, loss)
    same_gradients(ours, loss, [x, P])


def test_the_paper_takes_21_of_256_tokens() -> None:
    kind = ROUTERS["promoe_ec"]
    router = kind(kind.Config(), 12, D)  # type: ignore[call-arg]
    torch.nn.init.normal_(router.prototypes)  # type: ignore[arg-type]
    assert len(route(router, torch.randn(1, 256, D), split_of([0])).token_N) == 12 * 21


# -------------------------------------------------------------------------------------------------------------- k-means


def test_kmeans_nearest_centroid_and_its_update() -> None:
    router: Any = make("kmeans")
    places = []
    for seed in range(4):
        x = tokens(seed=seed)
        before = router.centroids.clone()
        routing = route(router, x, split_of())
        if seed == 0:  # E distinct tokens of the first batch
            before = router.centroids.clone()
            places = [int((x.reshape(-1, D) - c).norm(dim=1).argmin()) for c in before]
            assert len(set(places)) == E and torch.equal(x.reshape(-1, D)[places], before)
        nearest = [min(range(E), key=lambda i: float((t - before[i]).norm())) for t in x.detach().reshape(-1, D)]  # noqa: B023
        assert routing.expert_N.tolist() == nearest and (routing.weight_N == 1).all()
        assert torch.equal(router.centroids, before), "centroids move after the step, not in it"
        router.after_step()
        for i in range(E):
            own = [t for t, j in zip(x.reshape(-1, D), nearest, strict=True) if j == i]
            torch.testing.assert_close(router.centroids[i], torch.stack(own).mean(0) if own else before[i])


def test_kmeans_empty_centroid_keeps_its_place() -> None:
    router: Any = make("kmeans")
    route(router, tokens(), split_of())
    router.centroids[2] = 1e3
    router.drop_step()
    route(router, tokens(), split_of())
    router.after_step()
    assert (router.centroids[2] == 1e3).all() and (router.centroids[[0, 1, 3]].abs() < 10).all()


def test_kmeans_forgets_centroids_placed_on_tokens_that_are_not_finite() -> None:
    router: Any = make("kmeans")
    route(router, tokens() * float("nan"), split_of())
    assert not router.centroids.isfinite().any()
    router.drop_step()
    assert not router.placed.any() and router.centroids.isfinite().all()
    route(router, tokens(), split_of())
    assert router.placed.all() and router.centroids.isfinite().all()


def test_kmeans_starts_the_same_however_the_batch_is_split() -> None:
    """Two ranks that gather each other's candidates, and a batch too small to place every centroid."""
    whole: Any = make("kmeans")
    x = tokens(4)
    route(whole, x, split_of(LABELS[:4]))
    halves, mine = [make("kmeans") for _ in range(2)], []
    parts = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2, 3]))]
    for router, (part, rows) in zip(halves, parts, strict=True):  # first pass: see what each rank offers
        router.all_gather = lambda v: mine.append(v) or v
        route(router, part, split_of(LABELS[:2], row_B=rows))
    for part, rows in parts:
        router: Any = make("kmeans")
        router.all_gather = lambda v: torch.cat(mine)
        route(router, part, split_of(LABELS[:2], row_B=rows))
        assert torch.equal(router.centroids, whole.centroids)
    few: Any = make("kmeans", experts=S + 3)
    route(few, tokens(1), split_of([1]))
    assert few.placed.sum() == S
    route(few, tokens(2, seed=3), split_of([1, 2]))
    assert few.placed.sum() == S + 3


# -------------------------------------------------------------------------------------------------------------- DiffMoE


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scope", ["global", "rank"])
def test_diffmoe_training(scope: str, top_k: int) -> None:
    router: Any = make("diffmoe", top_k=top_k, scope=scope)
    threshold = None
    for seed in range(3):
        x = tokens(seed=seed)
        x_TD = x.reshape(-1, D)
        k = len(x_TD) * top_k // E
        score = torch.stack([(router.gate @ t).softmax(0) for t in x_TD])
        logit = torch.stack([
            router.out_weight @ F.silu(router.hidden_weight @ t.detach() + router.hidden_bias) + router.out_bias
            for t in x_TD
        ])  # fmt: skip
        taken = {(t, i) for i in range(E) for t in sorted(range(len(x_TD)), key=lambda t: -score[t, i].item())[:k]}  # noqa: B023
        routing = route(router, x, split_of())
        check(routing, {(t, i): score[t, i] for t, i in taken})
        terms = [
            -F.logsigmoid(logit[t, i] if (t, i) in taken else -logit[t, i]) for t in range(len(x_TD)) for i in range(E)
        ]
        loss = sum(terms) / len(terms)
        ours = losses_of(router, routing)["capacity"]
        torch.testing.assert_close(ours, loss)
        predictor = [router.hidden_weight, router.hidden_bias, router.out_weight, router.out_bias]
        same_gradients(ours, loss, predictor)  # type: ignore[arg-type]
        assert torch.autograd.grad(ours, x, allow_unused=True) == (None,), "x is detached"
        router.after_step()
        kth = torch.stack(
            [sorted(logit[:, i].sigmoid().tolist(), reverse=True)[k - 1] * torch.ones(()) for i in range(E)]
        )
        threshold = kth if threshold is None else 0.95 * threshold + 0.05 * kth
        torch.testing.assert_close(router.threshold, threshold.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inference", ["token", "pool"])
def test_diffmoe_inference(inference: str) -> None:
    router: Any = make("diffmoe", inference=inference).eval()
    router.threshold.copy_(torch.tensor([0.2, 0.5, 0.6, 1.1]))
    x = tokens()
    x_TD = x.reshape(-1, D)
    score, likely = (router.gate @ x_TD.T).softmax(0).T, router.predict(x_TD).sigmoid()
    above = {(t, i) for t in range(len(x_TD)) for i in range(E) if likely[t, i] > router.threshold[i]}
    if inference == "pool":
        number = [sum(i == j for _, j in above) for i in range(E)]
        above = {
            (t, i) for i in range(E) for t in sorted(range(len(x_TD)), key=lambda t: -score[t, i].item())[: number[i]]
        }
    routing = route(router, x, split_of())
    check(routing, {(t, i): score[t, i] for t, i in above})
    assert routing.terms == {} and 3 not in routing.expert_N and 0 < len(above) < len(x_TD) * E


def test_diffmoe_pool_of_several_ranks() -> None:
    """The union of the ranks' choices is the choice of one rank with all tokens; ties at the boundary are all taken."""
    generator = torch.Generator().manual_seed(0)
    score, likely = (torch.rand(21, E, generator=generator) for _ in range(2))
    whole = choose_here(score, likely, 21 // E)
    padding = torch.full((4, 2 * E), -1.0)
    pool = torch.cat([torch.cat([score, likely], 1)[:8], padding, torch.cat([score, likely], 1)[8:]])
    parts = [choose_in_pool(score[:8], pool, 1), choose_in_pool(score[8:], pool, 1)]
    assert torch.equal(torch.cat([p.taken_TE for p in parts]), whole.taken_TE)
    assert all(torch.equal(p.kth_E1, whole.kth_E1) for p in parts)
    pairs = [
        (t + 8 * r, i)
        for r, p in enumerate(parts)
        for t, i in zip(p.token_N.tolist(), p.expert_N.tolist(), strict=True)
    ]
    assert set(pairs) == set(zip(whole.token_N.tolist(), whole.expert_N.tolist(), strict=True))
    level = torch.full((6, E), 0.25)
    assert choose_in_pool(level, torch.cat([level, level], 1), 1).taken_TE.sum() == 6 * E
    assert choose_here(level, level, 1).taken_TE.sum() == E
    empty = choose_in_pool(score[:0], padding, 1)
    assert len(empty.token_N) == 0 and (empty.kth_E1 == 0).all()


# ------------------------------------------------------------------------------------------- classification and uniform


@pytest.mark.parametrize("labels", [LABELS, [3, 1, 9, NULL, NULL]])
def test_classification(labels: list[int]) -> None:
    router, x = make("classification", superclasses="digits"), tokens()
    W, b = router.weight, router.bias
    group = {0: 0, 8: 0, 6: 1, 9: 1, 1: 2, 4: 2, 7: 2, 2: 3, 3: 3, 5: 3}
    expected, losses = {}, []
    for j, image in enumerate(x):
        p = (W @ (sum(image) / S) + b).softmax(0)  # type: ignore[operator]
        best = int(p.argmax())
        expected |= {(j * S + s, best): p[best] for s in range(S)}
        if labels[j] != NULL:
            losses.append(-p[group[labels[j]]].log())
    routing = route(router, x, split_of(labels))
    check(routing, expected)
    ours = losses_of(router, routing)["superclass"]
    torch.testing.assert_close(ours, torch.stack(losses).mean())
    same_gradients(ours, torch.stack(losses).mean(), [x, W, b])  # type: ignore[list-item]


@pytest.mark.parametrize("top_k", [1, 3])
def test_uniform(top_k: int) -> None:
    routing = route(make("uniform", experts=5, top_k=top_k), tokens(), split_of())
    expected = {}
    for b, label in enumerate(LABELS):
        for s in range(S):
            for j in range(top_k):
                expected[b * S + s, ((label * S + s) * top_k + j) % 5] = torch.tensor(1 / top_k, dtype=torch.float64)
    check(routing, expected)
    load = torch.bincount(routing.expert_N, minlength=5)
    assert load.max() - load.min() <= len(LABELS)
