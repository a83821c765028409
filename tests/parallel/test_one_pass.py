"""Clipping, AdamW and EMA in one pass are those one after the other, also compiled."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.config.schema import OptimizerConfig
from promoe_ds.parallel import one_pass
from promoe_ds.parallel.adamw_ema import AdamWithEMA
from tests.launch import CXX

CONFIG = OptimizerConfig(lr=1e-2, ema_decay=0.9, weight_decay=0.1)


def train(adam: AdamWithEMA, params: list[torch.nn.Parameter], clip: float, steps: int, before: bool) -> None:
    """The same gradients for every call; clipped here, or by the optimizer."""
    generator = torch.Generator().manual_seed(1)
    adam.clip = lambda: clip
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * (clip if before else 1.0)
        adam.step()


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (7, 1, 11), (130,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_one_pass_against_clipping_adamw_and_ema_apart() -> None:
    for steps in (1, 2, 30):
        theirs, ours = parameters(), parameters()
        apart, together = AdamWithEMA(theirs, CONFIG), AdamWithEMA(ours, CONFIG, one_pass.update)
        train(apart, theirs, 0.3, steps, before=True)
        train(together, ours, 0.3, steps, before=False)
        for p, q in zip(theirs, ours, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6 * steps, atol=1e-7 * steps)
            assert together.state[q].keys() == apart.state[p].keys() and together.state[q]["step"] == steps
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                torch.testing.assert_close(together.state[q][name], apart.state[p][name], rtol=1e-5, atol=1e-7)


def test_refused_steps_change_nothing_and_make_the_state() -> None:
    params = parameters()
    p, adam = params[0], AdamWithEMA(params, CONFIG, one_pass.update)
    adam.refuse, start = True, p.detach().clone()
    train(adam, params, 0.3, 2, before=False)
    assert torch.equal(p, start) and torch.equal(adam.state[p]["ema"], start) and adam.state[p]["step"] == 0


def test_several_averages() -> None:
    """The function takes any number."""
    w, g = torch.ones(4), torch.full((4,), 2.0)
    averages = [torch.zeros(4), torch.zeros(4)]
    group = {"betas": (0.9, 0.999), "lr": 0.1, "eps": 1e-8, "weight_decay": 0.0}
    one_pass.update(w, g, torch.zeros(4), torch.zeros(4), averages, one_pass.scalars(group, 1, 1.0, [0.5, 0.75]))
    torch.testing.assert_close(w, torch.full((4,), 0.9))  # Adam's first step is lr
    torch.testing.assert_close(averages[0], 0.5 * w)
    torch.testing.assert_close(averages[1], 0.25 * w)


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for every size but 1, and the same numbers; scalar loops are refused."""
    update = one_pass.compiled()
    if update is None:
        pytest.skip("the compiler finds no vector instructions")
    theirs, ours = parameters(), parameters()
    train(AdamWithEMA(theirs, CONFIG, one_pass.update), theirs, 0.3, 3, before=False)
    train(AdamWithEMA(ours, CONFIG, update), ours, 0.3, 3, before=False)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: False)
    assert one_pass.compiled() is None
