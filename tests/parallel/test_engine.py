"""What the engine changes in DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from promoe_ds.parallel.adamw_ema import AdamWithEMA
from promoe_ds.parallel.engine import Engine, _leave_out_copies, _reduce_beside_work
from promoe_ds.recipes.load import load_config
from tests.launch import ENVIRONMENT


class Waited(Exception):
    """for the device"""


def test_a_reduction_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own method, as on a device that computes beside the host. Without contiguous buckets it must."""

    def wait() -> None:
        raise Waited

    monkeypatch.setattr(get_accelerator(), "resolves_data_dependency", lambda: False)
    monkeypatch.setattr(get_accelerator(), "synchronize", wait)
    gradient, reduced = torch.ones(3), torch.full((3,), 2.0)
    for contiguous, waits in ((True, False), (False, True)):
        zero: Any = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
        zero.overlap_comm, zero.contiguous_gradients, zero.dp_process_group = True, contiguous, None
        zero.allreduce_bucket = lambda *args, **kwargs: reduced
        zero.unflatten = lambda flat, like: [flat]
        with pytest.raises(Waited):
            zero.allreduce_and_copy([gradient], torch.float32)
        _reduce_beside_work(zero)
        if waits:
            with pytest.raises(Waited):
                zero.allreduce_and_copy([gradient], torch.float32)
        else:
            zero.allreduce_and_copy([gradient], torch.float32)
            assert torch.equal(gradient, reduced)
        assert zero.overlap_comm


def test_mean_gradients_are_means_from_the_first_step_on() -> None:
    """Of all gradients so far, with the weights beta1 ** age."""
    config = load_config("tiny", ["optimizer.beta1=0.8"])
    engine: Any = Engine.__new__(Engine)
    engine.stage, engine.config, engine.topology = 0, config, SimpleNamespace(ep=1)
    engine.params = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("a", "b")}
    engine.adam = AdamWithEMA(list(engine.params.values()), config.optimizer)
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for name, p in engine.params.items():
            p.grad = torch.randn(2, 3, generator=generator)
            seen[name].append(p.grad.double())
        engine.adam.step()
        weight = [0.8 ** (step - i) for i in range(step + 1)]
        found = engine.mean_gradients(["a", "b"])
        for name, gradients in seen.items():
            mean = sum(w * g for w, g in zip(weight, gradients, strict=True)) / sum(weight)
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_no_compiler_is_loaded_to_start() -> None:
    """Two seconds for each rank: DeepSpeed's Muon would load it, torch's AdamW and the way in which torch makes and
    fills tensors, and whoever looks at routers."""
    program = """
import sys, torch
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.observe import watching
from promoe_ds.recipes.load import load_config
config = load_config("tiny")
model = materialize(build(config), 0)
with watching(model, print):
    pass
assert "sympy" not in sys.modules, "for sampling"
from promoe_ds.parallel.adamw_ema import AdamWithEMA
from promoe_ds.parallel.engine import _import_muon
_import_muon()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
weight = torch.nn.Parameter(torch.ones(2))
adam = AdamWithEMA([weight], config.optimizer)
weight.grad = torch.ones(2)
adam.step()
adam.zero_grad()
assert weight.grad is None and (weight < 1).all()
assert "torch._dynamo" not in sys.modules and MuonWithAuxAdam, "for training"
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)


def test_buckets_that_are_not_averaged_are_copied_on_the_stream_that_fills_them() -> None:
    """What waits for that stream is in the method that is left out, and with `overlap_comm` another one copies."""
    zero = SimpleNamespace(overlap_comm=True, bit16_groups=[[]], _use_compact_grad_partition_buffer=lambda i: False)
    _leave_out_copies(SimpleNamespace(optimizer=zero), stage=2)
    assert zero.overlap_comm is False and zero.average_tensor(torch.ones(1), torch.float32) is None
