"""The learning rate by step: torch's schedulers give the same values, and impossible phases are named."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schedule import learning_rate, same_rates
from promoe_ds.config.schema import Config
from promoe_ds.recipes.load import load_config

LR, WARM, END = 0.02, 4, 24


def configured(*overrides: str) -> Config:
    return load_config("tiny", [f"optimizer.lr={LR}", f"train.steps={END}", *overrides])


def rates_of(*schedulers: Callable[[Any], Any], milestones: list[int]) -> list[float]:
    """The rates that torch's schedulers give to 30 steps, one scheduler after the other."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    chained = lr_scheduler.SequentialLR(optimizer, [make(optimizer) for make in schedulers], milestones)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chained.step()
    return rates


def warm(optimizer: Any) -> Any:
    return lr_scheduler.LinearLR(optimizer, 1 / WARM, 1.0, WARM - 1)


def fall(steps: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)


def stay(optimizer: Any) -> Any:
    return lr_scheduler.ConstantLR(optimizer, 1.0)


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, END - WARM, 0.1 * LR)


def floor(optimizer: Any) -> Any:
    return lr_scheduler.ConstantLR(optimizer, 0.1, 1000)


@pytest.mark.parametrize(
    ("name", "schedulers", "milestones"),
    [
        ("constant", [warm, stay], [WARM]),
        ("cosine", [warm, cosine, floor], [WARM, END]),
        ("linear", [warm, fall(END - WARM)], [WARM]),
        ("wsd", [warm, stay, fall(6)], [WARM, END - 6]),
    ],
)
def test_values_are_those_of_torch(name: str, schedulers: list[Any], milestones: list[int]) -> None:
    """Also past the end of the schedule, where it stays at its floor."""
    config = configured(f"optimizer.schedule={name}", f"optimizer.warmup_steps={WARM}", "optimizer.lr_floor=0.1",
                        "optimizer.decay_steps=6")  # fmt: skip
    ours = [learning_rate(config, step) for step in range(1, 31)]
    assert ours == pytest.approx(rates_of(*schedulers, milestones=milestones), rel=1e-12)
    assert ours[0] == LR / WARM and ours[WARM] == LR


def test_the_default_is_the_rate_itself_to_the_bit() -> None:
    config = load_config("imagenet256_promoe_b")
    assert {learning_rate(config, step) for step in (1, 2, 499_999, 500_000, 7_000_000)} == {config.optimizer.lr}


def test_lengths_that_are_not_given() -> None:
    """A schedule ends with the run, a decay is its last tenth, rounded up."""
    config = configured("optimizer.schedule=wsd", "train.steps=95")
    assert [learning_rate(config, step) for step in (86, 87)] == [LR, pytest.approx(0.9 * LR)]
    assert learning_rate(configured("optimizer.schedule=linear"), END) == pytest.approx(LR / END)
    longer = configured("optimizer.schedule=linear", "optimizer.schedule_steps=24", "train.steps=99")
    assert learning_rate(longer, END) == pytest.approx(LR / END) and learning_rate(longer, 25) == 0


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        ("cosine warmup_steps=3", [1 / 3, 2 / 3, 1, 0.25, 0.25]),
        ("linear warmup_steps=3", [1 / 3, 2 / 3, 1, 0.25, 0.25]),
        ("wsd decay_steps=3", [1, 0.75, 0.5, 0.25, 0.25]),
        ("wsd decay_steps=2 warmup_steps=1", [1, 1, 0.625, 0.25, 0.25]),
    ],
)
def test_phases_that_fill_the_schedule(overrides: str, shares: list[float]) -> None:
    """After 3 steps it is at its floor, whatever they were."""
    config = configured("optimizer.schedule_steps=3", "optimizer.lr_floor=0.25",
                        *(f"optimizer.{text}" for text in f"schedule={overrides}".split()))  # fmt: skip
    assert [learning_rate(config, step) / LR for step in range(1, 6)] == pytest.approx(shares)


def test_whether_steps_have_the_same_rates() -> None:
    """As by a look at each, however many there are."""
    ends = "", " schedule_steps=5", " schedule_steps=30", " lr_floor=0.1", " decay_steps=3", " warmup_steps=3"
    texts = [f"{name}{more}" for name in ("constant", "cosine", "linear", "wsd") for more in ends]
    configs = [configured(*(f"optimizer.{text}" for text in f"schedule={words}".split())) for words in texts]
    rates = [[learning_rate(config, step) for step in range(1, 60)] for config in configs]
    agree = 0
    for (one, a), (other, b) in product(zip(configs, rates, strict=True), repeat=2):
        for first, last in product((1, 2, 4, 6, 22, 25, 31), (6, 22, 25, 31, 59)):
            if first <= last:
                assert same_rates(one, other, first, last) == (a[first - 1 : last] == b[first - 1 : last])
                agree += one is not other and same_rates(one, other, first, last)
    assert agree > 1000
    end = 10**12
    more = [configured("optimizer.schedule=cosine", f"train.steps={steps}") for steps in (end, end, end + 10**6)]
    assert same_rates(more[0], more[1], 1, end) and not same_rates(more[0], more[2], 1, end)
    late = [configured("optimizer.schedule=wsd", f"train.steps={end}", f"optimizer.decay_steps={d}") for d in (8, 9)]
    assert same_rates(*late, 1, end - 8) and not same_rates(*late, 1, end + 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("schedule=cosine warmup_steps=25", "optimizer.warmup_steps=25: the cosine schedule has 24 steps; short"),
        ("schedule=wsd decay_steps=30", "optimizer.decay_steps=30: with optimizer.warmup_steps=0 it does not fit"),
        ("schedule=wsd warmup_steps=22", "decay_steps=3: with optimizer.warmup_steps=22 it does not fit"),
        ("lr_floor=1", "optimizer.lr_floor=1.0: must lie in [0, 1)"),
        ("schedule=wds", "optimizer.schedule='wds': must be one of constant, cosine, linear, wsd; did you mean"),
        ("warmup_steps=-1", "optimizer.warmup_steps=-1: must not be negative"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*(f"optimizer.{text}" for text in overrides.split()))
    assert message in str(caught.value) and "\n" not in str(caught.value)
