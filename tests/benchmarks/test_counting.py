"""What is counted on fake tensors is what a real step does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from benchmarks import count_eager, throughput
from tests.launch import ENVIRONMENT, ROOT

SMALL = ("model.depth=2", "model.width=48", "model.heads=4", "model.image_size=8")


def test_bytes_of_an_operator() -> None:
    x, y = torch.zeros(3, 4), torch.zeros(4)
    with count_eager.Traffic() as traffic:
        x @ y[:, None].expand(4, 5)
        (x + y).view(2, 6)
    assert traffic.total("memory") == (1, 4 * (12 + 4 + 12))
    assert traffic.total("product") == (1, 4 * (12 + 4 + 15)), "an expanded dimension counts once"


@pytest.mark.parametrize("name", ["dense", "promoe"])
def test_a_fake_step_is_counted_as_the_real_one(name: str) -> None:
    model = throughput.make_model(f"{name}_s", torch.device("cpu"), *SMALL)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), throughput.labels(4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, t, y)
        total = output.prediction.float().square().mean()
        (total + sum(loss_L.sum() for loss_L in output.aux_losses.values())).backward()

    step()  # constants are made once
    model.zero_grad()
    with count_eager.Traffic() as real:
        step()
    fake = count_eager.count(f"imagenet256_{name}_s", 4, SMALL, on_cuda=False)
    for kind in ("product", "attention"):
        assert fake.total(kind) == real.total(kind)
    assert fake.total("memory") == pytest.approx(real.total("memory"), rel=0.05), "the split is made outside"


@pytest.mark.slow
def test_counting_kernels_without_triton_is_one_line() -> None:
    if importlib.util.find_spec("triton"):
        pytest.skip("triton is installed: the line is for those without it")
    command = [sys.executable, str(ROOT / "benchmarks/count_compiled.py"), "xl", "64"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "comes without Triton; install the CUDA build of torch; it needs no GPU" in done.stderr
