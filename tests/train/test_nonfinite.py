"""The layer that a loss or gradient which is not finite comes from."""

from __future__ import annotations

import math

import torch
from torch import nn

from promoe_ds.train.nonfinite import Findings, Probe, culprit, place


def findings(model: nn.Module, x: torch.Tensor) -> Findings:
    with Probe(model) as probe:
        probe.data([x])
        model(x).sum().backward()
    model(x).sum().backward()  # not watched
    return probe.findings()


def test_the_first_bad_output_is_named_and_not_what_it_spoils() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 4))
    with torch.no_grad():
        model[1][0].weight[2, 1] = math.inf
    found = findings(model, torch.ones(3, 4))
    assert (found.order, found.module) == (2, "1.0")
    assert place([Findings(None, ""), found]) == "first seen in the output of 1.0 on rank 1"
    assert place([Findings(5, "2"), found, Findings(2, "1.0")]) == "first seen in the output of 1.0 on rank 1"
    assert place([findings(model, torch.full((3, 4), math.nan))]) == "first seen in the images on rank 0"


def test_the_first_bad_image_is_named() -> None:
    probe, bad = Probe(nn.Identity()), torch.ones(3, 4)
    bad[1, 2] = bad[2, 0] = math.inf
    probe.data([torch.ones(3, 4), bad], lambda batch, item: f"{batch}/{item}.png")
    assert place([probe.findings()]) == "first seen in the images on rank 0: 1/1.png"


def test_the_worst_gradient_is_named_if_outputs_are_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), math.nan))
    model[0].bias.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), math.inf))
    found = findings(model, torch.ones(3, 4))
    assert found.order is None and found.bad == {"1.weight": (4, 8), "0.bias": (1, 4)}
    start = "outputs are finite; most of it is in the gradient of "
    assert place([Findings(None, ""), found]) == f"{start}1.weight (4 of 8 values on rank 1)"
    other = Findings(None, "", {"0.bias": (4, 4)})
    assert place([found, other]) == f"{start}0.bias (5 of 8 values on 2 ranks)"
    assert "no layer's output or gradient shows it" in place([Findings(None, "")])


def test_the_total_loss_is_blamed_last() -> None:
    names, good = ["loss", "loss/diffusion", "loss/balance"], [1.0, 1.0, 1.0]
    assert culprit(names, [good, good]) == ""
    assert culprit(names, [[math.nan, 1.0, math.nan], [math.nan] * 3]) == "rank 1: loss/diffusion is nan"
    assert culprit(names, [[math.inf, 1.0, 1.0]]) == "rank 0: loss is inf"
