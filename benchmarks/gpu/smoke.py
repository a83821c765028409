"""Whether the card computes what it should: each figure says `ok`.

Kernels against float64 or a plain formula, every router against the CPU, compiled blocks against plain ones, and no
wait of the host. What could end the process (an assertion on the device) comes last.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.figures import Figure, Stage, relative
from benchmarks.op_counting import host_syncs
from benchmarks.throughput import make_model
from promoe_ds.models.compiled import compile_model
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.experts import grouped_mm
from promoe_ds.moe.router import ROUTERS
from promoe_ds.recipes.load import load_config

FP32, BF16 = torch.float32, torch.bfloat16
GROUPS = ((64, 0, 192, 1, 7, 0), (0, 0, 40), (128, 128))
"""rows of each expert"""
ATTENTION = ("default", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
MIXED, NULLS = (0, 1, 2, 3, 4, 10), (10,) * 6
"""labels; 10 is none"""
NEEDS = {"classification": ["moe.router.superclasses=digits", "moe.num_experts=4"]}


def run(stage: Stage) -> None:
    for dtype in (BF16, FP32):
        for sizes in GROUPS:
            stage.measure(f"grouped_mm {named(dtype)} {sizes}", partial(grouped, stage, dtype, sizes))
    for head in (64, 72):
        for backend in ATTENTION[:1] if stage.dry else ATTENTION:
            stage.measure(f"attention {head} {backend}", partial(attention, stage, head, backend))
    for router in sorted(ROUTERS):
        for precision in (FP32, BF16):
            stage.measure(f"{router} {named(precision)}", partial(against_cpu, stage, router, precision, MIXED))
    for router in ["promoe"] if stage.dry else sorted(name for name, kind in ROUTERS.items() if kind.one_graph):
        for precision in (BF16,) if stage.dry else (FP32, BF16):
            name = f"{router} {named(precision)} compiled"
            stage.measure(name, partial(compiled_against_plain, stage, router, precision, MIXED))
    for precision in (BF16, FP32):
        stage.measure(f"host syncs {named(precision)}", partial(syncs, stage, precision))
    for dtype in (FP32, BF16):
        stage.measure(f"grouped_mm {named(dtype)} no rows", partial(grouped, stage, dtype, (0, 0, 0)))
    stage.measure("promoe bf16 no label", partial(against_cpu, stage, "promoe", BF16, NULLS))
    stage.measure("promoe bf16 no label compiled", partial(compiled_against_plain, stage, "promoe", BF16, NULLS))


def named(dtype: torch.dtype) -> str:
    return "fp32" if dtype == FP32 else "bf16"


def grouped(stage: Stage, dtype: torch.dtype, sizes: tuple[int, ...], K: int = 192, M: int = 256) -> Figure:
    """Result and gradients against float64. The memory handed out is full of NaN: what is not written shows."""
    E, device = len(sizes), stage.device
    x = torch.randn(sum(sizes), K, device=device, dtype=dtype, requires_grad=True)
    w = (torch.randn(E, M, K, device=device, dtype=dtype) / K**0.5).requires_grad_()
    ends = torch.tensor(sizes, device=device).cumsum(0).int()
    poison = [torch.full(shape, float("nan"), device=device, dtype=dtype)
              for shape in ((E, M, K), (len(x), M), (len(x), K)) for _ in range(2)]  # fmt: skip
    del poison
    y = grouped_mm(x, w.mT, offs=ends)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None and w.grad is not None
    x64, w64 = (p.detach().double().requires_grad_() for p in (x, w))
    expected = torch.cat([rows @ w64[i].T for i, rows in enumerate(x64.split(sizes))])
    expected.backward(gradient.double())
    assert x64.grad is not None and w64.grad is not None
    empty = [i for i, size in enumerate(sizes) if not size]
    errors = {"y": relative(y, expected), "dx": relative(x.grad, x64.grad), "dw": relative(w.grad, w64.grad)}
    zero = bool((w.grad[empty] == 0).all())
    limit = 2e-2 if dtype == BF16 else 1e-4
    return {**errors, "empty_zero": zero, "ok": zero and all(error < limit for error in errors.values())}


def attention(stage: Stage, head: int, backend: str) -> Figure:
    """At XL's width and micro-batch 64; the rate counts forward's two products, and backward's five."""
    B, S, H, device = (2, 16, 2, stage.device) if stage.dry else (64, 256, 1152 // head, stage.device)
    packed = torch.randn(B, S, 3, H, head, device=device, dtype=BF16, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    gradient = torch.randn(B, H, S, head, device=device, dtype=BF16)
    with torch.no_grad():
        expected = torch.softmax(q.float() @ k.float().mT / head**0.5, -1) @ v.float()
    chosen = contextlib.nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend))
    with chosen:
        y = F.scaled_dot_product_attention(q, k, v)
        forward = stage.timed(lambda: F.scaled_dot_product_attention(q, k, v))
        both = stage.timed(lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), packed, gradient))
    error, flops = relative(y, expected), 4 * B * H * S * S * head
    return {
        "error": error,
        "kernel": type(y.grad_fn).__name__,
        "forward_TFLOP_s": flops / forward / 1e12,
        "both_TFLOP_s": 3.5 * flops / both / 1e12,
        "ok": error < 2e-2,
    }


class Passed(NamedTuple):
    """One forward and backward."""

    prediction: Tensor
    gradients: dict[str, Tensor]
    tokens_per_expert_LE: Tensor


def passed(
    router: str, device: torch.device, dtype: torch.dtype, labels: tuple[int, ...], backend: str | None = None
) -> Passed:
    """The smallest model with this router, the same weights and inputs on every device."""
    config = load_config("tiny", [f"moe.router.name={router}", "train.precision=fp32", *NEEDS.get(router, ())])
    model = materialize(build(config), 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    model = model.to(device).train()
    m, images = config.model, len(labels)
    x, t = torch.randn(images, m.channels, m.image_size, m.image_size, generator=g), torch.rand(images, generator=g)
    if backend:
        torch.compiler.reset()
        compile_model(model, backend)
    with torch.autocast(device.type, BF16, enabled=dtype == BF16):
        output = model(x.to(device), (1000 * t).to(device), torch.tensor(labels))
    total_of(output).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Passed(output.prediction.detach().cpu(), gradients, output.tokens_per_expert_LE.cpu())


def total_of(output: Any) -> Tensor:
    """A loss that depends on everything."""
    return output.prediction.float().square().mean() + sum(loss_L.sum() for loss_L in output.aux_losses.values())


def compared(found: Passed, expected: Passed, dtype: torch.dtype) -> Figure:
    """fp32: every gradient. bf16: all together, because a token or two may go to another expert."""
    each = {
        name: relative(found.gradients[name], g) for name, g in expected.gradients.items() if float(g.norm()) > 1e-6
    }
    worst = max(each, key=each.__getitem__)
    whole = relative(*(torch.cat([side.gradients[name].flatten() for name in each]) for side in (found, expected)))
    prediction = relative(found.prediction, expected.prediction)
    same = found.gradients.keys() == expected.gradients.keys()
    fits = max(prediction, each[worst]) < 1e-3 if dtype == FP32 else prediction < 5e-2 and whole < 0.1
    return {
        "prediction": prediction,
        "gradients": whole,
        "worst_gradient": each[worst],
        "of": worst,
        "same_experts": torch.equal(found.tokens_per_expert_LE, expected.tokens_per_expert_LE),
        "ok": same and fits,
    }


def against_cpu(stage: Stage, router: str, dtype: torch.dtype, labels: tuple[int, ...]) -> Figure:
    """The model on the device, against fp32 on the CPU."""
    expected = passed(router, torch.device("cpu"), FP32, labels)
    return compared(passed(router, stage.device, dtype, labels), expected, dtype)


def compiled_against_plain(stage: Stage, router: str, dtype: torch.dtype, labels: tuple[int, ...]) -> Figure:
    """Both on the device and in this precision."""
    backend = "eager" if stage.dry else "inductor"
    expected = passed(router, stage.device, dtype, labels)
    return compared(passed(router, stage.device, dtype, labels, backend), expected, dtype)


def syncs(stage: Stage, dtype: torch.dtype) -> Figure:
    """Waits in forward and backward of ProMoE-S. None in bf16; in fp32 torch has no grouped kernel, and waits."""
    side = 8 if stage.dry else 16
    small = ["model.depth=2", "model.width=48", "model.heads=4"] if stage.dry else []
    model = make_model("promoe_s", stage.device, f"model.image_size={side}", *small)
    x, t = torch.randn(4, 4, side, side, device=stage.device), 1000 * torch.rand(4, device=stage.device)
    labels = torch.tensor([1, 2, 3, 1000])

    def both() -> None:
        with torch.autocast(stage.device.type, BF16, enabled=dtype == BF16):
            output = model(x, t, labels)
        total_of(output).backward()

    both()
    found = host_syncs(both, stage.device)
    return {"syncs": found, "ok": found == 0 or dtype == FP32}
