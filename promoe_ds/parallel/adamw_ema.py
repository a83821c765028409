"""AdamW whose state also holds exponential moving averages (EMA) of the weights it updates.

Under ZeRO the optimizer sees the fp32 master weights, or this rank's partition of them: the averages are then in fp32
and sharded or offloaded like the moments, without a second copy of the model anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from promoe_ds.config.schema import OptimizerConfig
from promoe_ds.parallel import one_pass

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)
"""without torch's wrapper, see `AdamWithEMA`"""


class AdamWithEMA(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) and, per step, ema <- decay * ema + (1 - decay) * weight, started at the weight.

    The states of a parameter are torch's, and those of `OptimizerConfig.averages`.

    torch hides three of its methods from its compiler, and for that imports it: two seconds of every rank's start. We
    compile no optimizer (`one_pass` compiles a function of tensors), and take the methods as they are.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, params: Any, config: OptimizerConfig, update: one_pass.Update | None = None):
        super().__init__(
            params,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.averages = config.averages()
        self.refuse = False
        """let `step` change nothing"""
        self.update = update
        """does all in one pass over memory, gradients clipped by `clip`, if given; see `one_pass`"""
        self.clip: Callable[[], float] = lambda: 1.0
        """the factor of the gradients of this step, if `update` does it"""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        live = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.refuse:
            self.start(live)
            return None
        if self.update and live:
            self._in_one_pass(self.update, live)
            return None
        first = {p: p.detach().clone() for p in live if "ema" not in self.state[p]}
        loss = ADAMW_STEP(self, closure)
        for p, start in first.items():
            self.state[p] |= {name: start.clone() if i else start for i, name in enumerate(self.averages)}
        for name, decay in self.averages.items() if live else ():
            torch._foreach_lerp_([self.state[p][name] for p in live], live, 1 - decay)
        return loss

    def _in_one_pass(self, update: one_pass.Update, live: list[Tensor]) -> None:
        self.start(live)
        clip, averages = self.clip(), self.averages
        names = ("exp_avg", "exp_avg_sq", *averages)
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                state["step"] += 1
                scalar_S = one_pass.scalars(group, int(state["step"]), clip, list(averages.values()))
                tensors = p, p.grad.contiguous(), *(state[name] for name in names)
                w_N, g_N, m_N, v_N, *average_N = (x.detach().view(-1) for x in tensors)
                update(w_N, g_N, m_N, v_N, average_N, scalar_S)

    @torch.no_grad()
    def start(self, params: list[Tensor]) -> None:
        """Make the state before the first update of those of `params` that have none."""
        fresh = [p for p in params if "ema" not in self.state[p]]
        self.allocate(fresh, 0)
        for p in fresh:
            for name in self.averages:
                self.state[p][name].copy_(p)

    def allocate(self, params: list[Tensor], step: int) -> None:
        """Make the state of `params` as after `step` updates, to be filled from a checkpoint."""
        for p in params:
            names = (*MOMENTS, *self.averages)
            self.state[p] = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
            self.state[p]["step"] = torch.tensor(float(step), device=p.device)
