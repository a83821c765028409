"""Backends of the experts agree, and say in one line why one cannot run."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.config.errors import ConfigError
from promoe_ds.moe.dispatch import ExpertRows, expert_offsets
from promoe_ds.moe.experts import StackedExperts, backend_problem, check_backend
from promoe_ds.recipes.load import load_tree

D, HIDDEN, E = 8, 12, 4
BF16 = {"train": {"precision": "bf16_autocast"}, "moe": {"experts_backend": "megablocks"}}


def reference_gmm(x_NK: Tensor, w_EMK: Tensor, size_E: Tensor, trans_b: bool) -> Tensor:
    """What `grouped_gemm.ops.gmm` documents: counts on the host, int64; weights transposed by option."""
    assert trans_b and size_E.device.type == "cpu" and size_E.dtype == torch.int64
    return torch.cat([x @ w.T for x, w in zip(x_NK.split(size_E.tolist()), w_EMK, strict=True)])


@pytest.mark.parametrize("expert", [[0, 0, 0, 1, 1, 3, 3, 3], [2, 2], []], ids=["one empty", "one busy", "no rows"])
def test_backends_agree(monkeypatch: pytest.MonkeyPatch, expert: list[int]) -> None:
    """Values and gradients, against one MLP a row. The GPU's kernel behind megablocks is not run here."""
    package, ops = ModuleType("grouped_gemm"), ModuleType("grouped_gemm.ops")
    ops.gmm = reference_gmm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", ops)
    generator = torch.Generator().manual_seed(0)
    made = StackedExperts(E, D, HIDDEN, "loop")
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(generator=generator)
    x_ND = torch.randn(len(expert), D, generator=generator, requires_grad=True)
    expert_N = torch.tensor(expert, dtype=torch.int64)
    b1_EF, b2_ED = made.w3.squeeze(1).split([HIDDEN, D], dim=1)
    rows = [
        F.gelu(x @ made.w1[e].T + b1_EF[e], approximate="tanh") @ made.w2[e].T + b2_ED[e]
        for x, e in zip(x_ND, expert, strict=True)
    ]
    expected = torch.stack(rows) if rows else x_ND * 0
    inputs = [x_ND, *made.parameters()]
    want = [expected, *torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True)]
    for backend in ("loop", "grouped_mm", "megablocks"):
        made.backend = backend
        y_ND = made(ExpertRows(x_ND, expert_N, expert_offsets(expert_N, E)))
        found = [y_ND, *torch.autograd.grad(y_ND.square().sum(), inputs)]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


def test_why_megablocks_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_problem("grouped_mm", "cpu") is None and backend_problem("loop", "cuda") is None
    with pytest.raises(ConfigError) as error:
        check_backend(load_tree(BF16), "cpu")
    assert str(error.value).startswith("moe.experts_backend=megablocks: needs a CUDA device, this is cpu;")
    assert "moe.experts_backend=grouped_mm" in str(error.value)
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)
    with pytest.raises(
        ConfigError, match=r"megablocks: cannot be imported \(ModuleNotFoundError: .*docs/performance.md"
    ):
        check_backend(load_tree(BF16), "cuda")
    with pytest.raises(ConfigError, match=r"megablocks: megablocks computes in bf16 only, and train.precision is fp32"):
        load_tree({**BF16, "train": {"precision": "fp32"}})
