"""What every registered router must do, whatever its rule: one test, parametrised over the registry."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.config.schema import Config
from promoe_ds.costs import flops
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import Router, Routing, aux_losses_of
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.recipes.load import load_tree
from tests.moe import example_router
from tests.moe.test_layer import MIXES, Operations, losses_of, split_of

D, S, E, NULL = 16, 16, 4, 10
VARIANTS: dict[str, dict[str, Any]] = {
    "token_choice with all": {"score": "sigmoid", "top_k": 2, "renormalise": True, "bias_rate": 0.01, "z_weight": 0.1},
    "promoe with a bias": {"bias_rate": 0.01},
}
"""options beside the router's name"""
NAMES = [*sorted(ROUTERS), *VARIANTS]
assert ROUTERS["hash"] is example_router.HashRouter, "the example of CONTRIBUTING is tested like the rest"
SIZES = {
    "promoe": (E * D, E * D),
    "promoe_ec": (E * D, E * D),
    "token_choice": (E * D, E * D),
    "token_choice with all": (E * D, E * D),
    "promoe with a bias": (E * D, E * D),
    "expert_choice": (E * D, E * D),
    "diffmoe": (2 * E * D + E + D * D + D, 2 * E * D + D * D),  # no multiplication by a bias
    "kmeans": (0, E * D),
    "classification": (E * D + E, 0),  # one product an image
    "uniform": (0, 0),
    "hash": (0, 0),
}
"""parameters, and multiply-adds a token"""
EXTRA = VARIANTS | {"classification": {"superclasses": "digits"}}


def make_config(name: str, **moe: object) -> Config:
    model = {"width": D, "heads": 4, "num_classes": NULL, "image_size": 8, "patch": 2}
    router = {"name": name.split()[0], **EXTRA.get(name, {})}
    return load_tree({"model": model, "moe": {"num_experts": E, "experts_backend": "loop", "router": router, **moe}})


def make_layer(name: str, seed: int = 0, **moe: object) -> MoELayer:
    layer = MoELayer(make_config(name, **moe))
    draw = lambda prefix: lambda key: torch.Generator().manual_seed(seed + len(prefix) * 31 + len(key))  # noqa: E731
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())) * 0.3)
        router_of(layer).init_weights(draw("router"))
    return layer


def router_of(layer: MoELayer) -> Router:
    assert isinstance(layer.router, Router)
    return layer.router


def images(labels: list[int], seed: int = 1) -> Tensor:
    return torch.randn(len(labels), S, D, generator=torch.Generator().manual_seed(seed))


def step(layer: MoELayer, labels: list[int], seed: int = 1) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One training step without an optimizer: forward, backward, after_step."""
    split, x = split_of(labels), images(labels, seed)
    out, (terms, offsets_E, _) = layer(x[split.order_B], split)
    aux, count_E = losses_of(layer, terms, offsets_E), tokens_per_expert(offsets_E)
    (out.square().sum() + sum(aux.values())).backward()
    router_of(layer).after_step(count_E.float())
    return out[split.restore_B].detach(), aux, count_E


def check_edges(routing: Routing, tokens: int) -> None:
    token_N, expert_N, weight_N = routing.token_N, routing.expert_N, routing.weight_N
    assert token_N.dtype == expert_N.dtype == torch.int64 and weight_N.dtype == torch.float32
    assert token_N.shape == expert_N.shape == weight_N.shape == (len(token_N),)
    assert ((token_N >= 0) & (token_N < tokens)).all() and ((expert_N >= 0) & (expert_N < E)).all()
    assert weight_N.isfinite().all()
    assert len(set(zip(token_N.tolist(), expert_N.tolist(), strict=True))) == len(token_N), "an edge is there twice"
    if routing.top_k:
        assert torch.equal(token_N, torch.arange(tokens).repeat_interleave(routing.top_k))


@pytest.mark.parametrize("labels", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_edges_losses_and_gradients(name: str, conditional: bool, labels: list[int]) -> None:
    layer = make_layer(name, conditional=conditional)
    router, split = router_of(layer), split_of(labels)
    routed = split.num_conditional if conditional else len(labels)
    x_ISD = images(labels)[split.order_B][:routed]
    for mode in (True, False):
        routing = layer.train(mode).router(x_ISD.flatten(0, 1), S, split)  # type: ignore[operator]
        check_edges(routing, routed * S)
        assert mode or routing.terms == {}
    _, aux, count_E = step(layer.train(), labels)
    assert aux.keys() == type(router).aux_loss_weights(router_config(layer)).keys()
    assert all(loss.shape == () and loss.isfinite() for loss in aux.values())
    assert count_E.sum() > 0 or routed == 0
    for key, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        if key.startswith("router.") and split.num_conditional and routed:
            assert (p.grad != 0).any(), key
    for p in layer.routed.parameters():
        for expert in range(E):  # an expert without rows has a zero gradient, one with rows has not
            assert (p.grad is not None) and bool((p.grad[expert] != 0).any()) == bool(count_E[expert] > 0)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens_leave_experts_empty(name: str, conditional: bool) -> None:
    """All tokens alike: whoever chooses by token and image sends all to one expert; the others do no harm."""
    layer, labels = make_layer(name, conditional=conditional), [1, 1, 1]
    x = torch.linspace(-1, 1, D).expand(len(labels), S, D)
    out, (terms, offsets_E, _) = layer(x, split_of(labels))
    aux, count_E = losses_of(layer, terms, offsets_E), tokens_per_expert(offsets_E)
    (out.square().sum() + sum(aux.values())).backward()
    assert out.isfinite().all() and all(loss.isfinite() for loss in aux.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if name in ("token_choice", "promoe", "kmeans", "classification"):
        assert (count_E > 0).sum() == 1
    if name in ("expert_choice", "promoe_ec", "diffmoe", "uniform", "hash"):
        assert (count_E > 0).sum() > 1
    for p in layer.routed.parameters():
        assert p.grad is not None and all((p.grad[i] == 0).all() for i in range(E) if count_E[i] == 0)
    router_of(layer).after_step()
    assert all(b.isfinite().all() for b in layer.buffers())


def router_config(layer: MoELayer) -> Any:
    return getattr(layer.router, "config", None)


@pytest.mark.parametrize("name", NAMES)
def test_equal_steps_give_equal_bits(name: str) -> None:
    a, b = make_layer(name), make_layer(name)
    for seed in (1, 2, 3):
        (out, aux, _), (out_b, aux_b, _) = step(a, MIXES["mixed"], seed), step(b, MIXES["mixed"], seed)
        assert torch.equal(out, out_b) and all(torch.equal(aux[key], aux_b[key]) for key in aux)
    assert all(torch.equal(v, b.state_dict()[key]) for key, v in a.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_holds_everything_that_inference_needs(name: str) -> None:
    trained = make_layer(name)
    for seed in (1, 2):
        step(trained, MIXES["mixed"], seed)
    fresh = make_layer(name, seed=9)
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    labels = MIXES["mixed"]
    split, x = split_of(labels), images(labels, 5)
    a, b = (layer.eval()(x[split.order_B], split)[0] for layer in (trained, fresh))
    assert torch.equal(a, b)
    before = copy.deepcopy(fresh.state_dict())
    router_of(fresh).after_step()  # no training forward since: nothing to learn from
    assert all(torch.equal(v, before[key]) for key, v in fresh.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch_in_inference(name: str) -> None:
    labels = [0, 5, 2, 7]
    layer = make_layer(name)
    step(layer, labels)
    layer.eval()
    whole = layer(images(labels), split_of(labels))[0]
    for i, label in enumerate(labels):
        alone = layer(images(labels)[i : i + 1], split_of([label]))[0]
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_fp32_under_autocast_and_buffers_in_a_bf16_model(name: str) -> None:
    layer, labels = make_layer(name), [0, 1, 2]
    step(layer, labels)
    plain = layer.router(images(labels).flatten(0, 1), S, split_of(labels))  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = layer.router(images(labels).flatten(0, 1), S, split_of(labels))  # type: ignore[operator]
    assert torch.equal(plain.expert_N, routing.expert_N) and torch.equal(plain.weight_N, routing.weight_N)
    before = {key: b.clone() for key, b in layer.named_buffers()}
    layer.bfloat16()
    assert all(torch.equal(b, before[key]) and b.dtype == torch.float32 for key, b in layer.named_buffers())
    _, (terms, offsets_E, _) = layer(images(labels).bfloat16(), split_of(labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aux = losses_of(layer, terms, offsets_E)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in aux.values())


@pytest.mark.parametrize("name", NAMES)
def test_training_on_one_device_waits_for_nothing(name: str) -> None:
    """From the second step on: k-means looks once whether its centroids have a place."""
    layer = make_layer(name, experts_backend="grouped_mm")
    for _ in range(2):
        step(layer, MIXES["mixed"])
    split, x = split_of(MIXES["mixed"]), images(MIXES["mixed"])
    with Operations() as operations:
        out, (terms, offsets_E, _) = layer(x, split)
        (out.sum() + sum(losses_of(layer, terms, offsets_E).values())).backward()
        router_of(layer).after_step()
    assert not operations.waiting()


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_several_layers_are_those_of_each(name: str) -> None:
    """With one all-reduce for all of them, none where there is no loss, and the gradients of each alone."""
    layers, labels = [make_layer(name, seed) for seed in (1, 2, 3)], MIXES["mixed"]
    reduced: list[Tensor] = []
    router_of(layers[0]).all_reduce, split = lambda v: reduced.append(v) or v, split_of(labels)
    seen = [layer(images(labels, seed)[split.order_B], split) for seed, layer in enumerate(layers)]
    tokens_per_expert_LE = tokens_per_expert(torch.stack([stats.offsets_E for _, stats in seen]))
    losses = aux_losses_of(router_of(layers[0]), [stats.terms for _, stats in seen], tokens_per_expert_LE)
    assert len(reduced) == bool(losses) and all(loss_L.shape == (3,) for loss_L in losses.values())
    parameters = [p for layer in layers for p in layer.router.parameters()]
    for key, loss_L in losses.items():
        alone = [losses_of(layer, terms, end)[key] for layer, (_, (terms, end, _)) in zip(layers, seen, strict=True)]
        torch.testing.assert_close(loss_L, torch.stack(alone))
        grads = (
            torch.autograd.grad(loss.prod(), parameters, retain_graph=True, materialize_grads=True)
            for loss in (loss_L, torch.stack(alone))
        )
        torch.testing.assert_close(*map(list, grads))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_names(name: str) -> None:
    config, layer, kind = make_config(name), make_layer(name), ROUTERS[name.split()[0]]
    assert config.moe is not None
    found = sum(p.numel() for p in layer.router.parameters()), router_of(layer).macs_per_token()
    parameters, macs = SIZES.get(name, found)
    assert (
        found == (parameters, macs)
        and flops.count_parameters(config).by_part["router"] == len(config.moe_layers()) * parameters
    )
    assert flops._router(config).macs_per_token() == macs
    assert kind.Config is type(config.moe.router) and kind.Config().name == name.split()[0]
    assert all(b.is_floating_point() for b in layer.router.buffers())
    assert inspect.getdoc(kind.forward)
