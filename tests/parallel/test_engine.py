"""What the engine changes in DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from promoe_ds.parallel.engine import _reduce_beside_work


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
