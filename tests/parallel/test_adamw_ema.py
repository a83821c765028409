"""AdamW is torch's; the EMA is the recursion it says, from the initial weights."""

from __future__ import annotations

import torch

from promoe_ds.config.schema import OptimizerConfig
from promoe_ds.parallel.adamw_ema import AdamWithEMA


def test_ema_and_adamw_against_a_loop() -> None:
    config = OptimizerConfig(lr=0.1, ema_decay=0.8, weight_decay=0.01)
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adam = AdamWithEMA([ours], config)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    ema = start.clone()
    for i in range(4):
        for p, optimizer in ((ours, adam), (theirs, reference)):
            p.grad = torch.full((5,), float(i + 1))
            optimizer.step()
        ema = 0.8 * ema + 0.2 * theirs.detach()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(adam.state[ours]["ema"], ema)


def test_allocated_state_continues_exactly() -> None:
    config = OptimizerConfig(lr=0.1, ema_decay=0.8)
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    one, two = AdamWithEMA([p], config), AdamWithEMA([q], config)
    for _ in range(3):
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        one.step()
    two.allocate([q], 3)
    q.data.copy_(p.data)
    for name in ("exp_avg", "exp_avg_sq", "ema"):
        two.state[q][name].copy_(one.state[p][name])
    for parameter, optimizer in ((p, one), (q, two)):
        parameter.grad = torch.tensor([0.3, 0.1, -1.0])
        optimizer.step()
    assert torch.equal(p, q) and torch.equal(one.state[p]["ema"], two.state[q]["ema"])


def test_several_averages_are_those_of_separate_runs() -> None:
    """Also after a start without an update, and from allocated state."""
    decays = (0.8, 0.5, 0.0)
    config = OptimizerConfig(lr=0.1, ema_decay=decays[0], ema_more=decays[1:])
    assert list(config.averages()) == ["ema", "ema_0.5", "ema_0.0"]
    together = torch.nn.Parameter(torch.ones(3))
    several = AdamWithEMA([together], config)
    alone = [torch.nn.Parameter(torch.ones(3)) for _ in decays]
    single = [
        AdamWithEMA([p], OptimizerConfig(lr=0.1, ema_decay=decay)) for p, decay in zip(alone, decays, strict=True)
    ]
    several.start([together])
    assert all(torch.equal(several.state[together][name], torch.ones(3)) for name in config.averages())
    for i in range(4):
        for p, adam in zip((together, *alone), (several, *single), strict=True):
            p.grad = torch.tensor([1.0, -2.0, float(i)])
            adam.step()
    for name, p, adam in zip(config.averages(), alone, single, strict=True):
        assert torch.equal(several.state[together][name], adam.state[p]["ema"]) and torch.equal(together, p)
    several.allocate([together], 4)
    assert set(several.state[together]) == {"step", "exp_avg", "exp_avg_sq", "ema", "ema_0.5", "ema_0.0"}
