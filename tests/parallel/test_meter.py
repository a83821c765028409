"""Experts are timed by hooks, forward and backward, in any model that calls them."""

from __future__ import annotations

import time
from itertools import count

import pytest
import torch

from promoe_ds.models.compiled import compile_model
from promoe_ds.models.dit import DiT
from promoe_ds.parallel.meter import Meter
from promoe_ds.recipes.load import load_config
from tests.models.test_dit import awake

CPU = torch.device("cpu")


def model_of(*overrides: str) -> DiT:
    return awake(load_config("tiny", ["model.depth=2", *overrides]))


def parts(model: DiT) -> list[str]:
    """The parts of a step that took time, experts entered and left alike."""
    meter = Meter(model, CPU)
    out = model(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 10]))
    forward = meter.seconds["experts"]
    out.prediction.sum().backward()
    assert meter.stack == ["other"] and (forward == 0 or meter.seconds["experts"] > forward)
    return [part for part, seconds in meter.seconds.items() if seconds > 0]


@pytest.mark.parametrize("recomputation", ["none", "block", "selective"])
def test_experts_are_timed(recomputation: str) -> None:
    assert parts(model_of(f"train.activation_checkpointing={recomputation}")) == ["experts", "other"]


def test_experts_are_timed_beside_graphs_but_not_inside() -> None:
    assert parts(compile_model(model_of(), "eager", whole=False)) == ["experts", "other"]
    assert parts(compile_model(model_of("moe=null"), "eager")) == []
    with pytest.raises(AssertionError, match="a graph calls no hooks"):
        Meter(compile_model(model_of(), "eager"), CPU)


def test_parts_share_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own: the look at it is the n-th since the start at n * n seconds."""
    looks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks) ** 2))
    meter = Meter(torch.nn.Linear(1, 1), CPU)  # at 0
    with meter.part("backward"):  # 1
        with meter.part("experts"):  # 4
            pass  # 9
        meter.skip()  # 16, of which 7 are a pause
    report = meter.report(2, lambda x: x * 3, 3)  # 25, 36: per step of two, over three equal ranks
    seconds = {key: value for key, value in report.items() if key.startswith("seconds/") and value}
    assert seconds == {"seconds/other": (1 + 11) / 2, "seconds/backward": (3 + 9) / 2, "seconds/experts": 5 / 2}
    assert sum(seconds.values()) == (36 - 7) / 2
