"""The log's numbers of experts, against what the routers themselves return."""

from __future__ import annotations

import math

import torch

from promoe_ds.config import load_config
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.routing import RoutingContext
from promoe_ds.moe.trace import watching
from promoe_ds.train.experts import LAYERS_SHOWN, ExpertWatch, shown


def test_report_is_what_the_routers_did() -> None:
    model = materialize(build(load_config("tiny")), 0)
    watch, cpu = ExpertWatch(model), torch.device("cpu")
    label_B = torch.tensor([1, 2, 10, 3])
    ctx, t_B = RoutingContext.build(label_B, 10, cpu), torch.full((4,), 300.0)
    images, seen, outputs = torch.randn(2, 4, 1, 8, 8), [], []
    with watching(model, lambda block, router, x, routing: seen.append((block, routing))):
        for x_BCHW in images:  # two micro-batches
            outputs.append(model(x_BCHW, t_B, ctx))
            watch.see(outputs[-1])
    load = [output.load_LE for output in outputs]
    layers = watch.report(load[0] + load[1], lambda x: 2 * x)  # as if a second rank had the same
    assert layers["block"] == [1, 3] and len(seen) == 4
    for row, block in enumerate(layers["block"]):
        weight_N = torch.cat([routing.weight_N.detach() for b, routing in seen if b == block]).double()
        losses = [float(output.aux["routing_contrastive"][row].detach()) for output in outputs]
        assert math.isclose(layers["gate_mean"][row], weight_N.mean(), rel_tol=1e-5)
        assert math.isclose(layers["gate_std"][row], weight_N.std(unbiased=False), rel_tol=1e-4)
        assert math.isclose(layers["loss/routing_contrastive"][row], sum(losses) / 2, rel_tol=1e-5)
        norms = model.blocks[block].mlp.router.prototypes.detach().norm(dim=1)
        assert math.isclose(layers["prototype_norm"][row], norms.mean(), rel_tol=1e-5)
    watch.start()
    assert watch.report(load[0], lambda x: x).keys() == {"block", "load_max_over_mean", "load_entropy", "dead_experts"}


def test_a_dense_model_has_nothing_to_report() -> None:
    model = materialize(build(load_config("tiny", ["moe=null"])), 0)
    watch = ExpertWatch(model)
    watch.see(model(torch.randn(1, 1, 8, 8), torch.ones(1), RoutingContext.build(torch.tensor([1]), 10, "cpu")))
    assert watch.report(torch.zeros(0, 0), lambda x: x) == {} == shown({})


def test_tags_are_capped() -> None:
    layers = {"block": list(range(1, 57, 2)), "load_entropy": [0.5] * 27 + [None]}
    tags = shown(layers)
    assert len(tags) == LAYERS_SHOWN - 1 and "layers/load_entropy/block_01" in tags  # None has no tag
    assert shown({"block": [3], "gate_mean": [0.25]}) == {"layers/gate_mean/block_03": 0.25}
