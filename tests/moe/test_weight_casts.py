"""Casts of weights, counted, and the gradients that come through them."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from promoe_ds.config.schema import Config
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build
from promoe_ds.moe.weight_casts import cast_once, cast_weight, let_go, renew
from promoe_ds.recipes.load import load_config


class Casts(TorchDispatchMode):
    """How often each parameter is written in another precision, by name."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if p.requires_grad}
        self.count = dict.fromkeys(self.names.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (name := self.names.get(args[0].data_ptr())):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def drawn(config: Config) -> DiT:
    model = build(config).to_empty(device="cpu").train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1, generator=generator)
    return model


def step(model: DiT, micro_batches: int, once: bool) -> tuple[dict[str, int], list[Tensor]]:
    """Casts of a step of one model, and its gradients."""
    m, generator = model.config.model, torch.Generator().manual_seed(1)
    with Casts(model) as casts, cast_once() if once else nullcontext():
        for _ in range(micro_batches):
            x = torch.randn(4, m.channels, m.image_size, m.image_size, generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x, torch.full((4,), 500.0), torch.arange(4))
            assert not torch.is_autocast_enabled("cpu")
            (out.prediction.float().square().mean() + sum(x.sum() for x in out.aux_losses.values())).backward()
    return casts.count, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_once_per_step_and_gradients_equal_to_the_bit(checkpointing: str, micro_batches: int) -> None:
    config = load_config("tiny", [f"train.activation_checkpointing={checkpointing}"])
    (often, theirs), (once, ours) = (step(drawn(config), micro_batches, once) for once in (False, True))
    # Patches are multiplied by a view of their weight, and the key bias is held fixed in a copy: a cast each time, of
    # a thousandth of the weights. Labels are looked up in fp32.
    small = {name for name in once if name.startswith("x_embedder") or name.endswith("qkv.bias")}
    large = {name: number for name, number in once.items() if name not in small and often[name]}
    assert len(large) > 30 and set(large.values()) == {1}
    assert all(often[name] >= micro_batches for name in large)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_takes_any_gradient_gets_that_of_its_copy() -> None:
    """The same gradients before they are cast, so half the bytes, where a product has no other."""
    found = []
    for narrow in (False, True):
        model = drawn(load_config("tiny"))
        for p in model.parameters() if narrow else ():
            p.grad_dtype = None
        step(model, 1, once=True)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wide, narrow = found
    assert wide.keys() == narrow.keys()
    half = {name for name, grad in narrow.items() if grad.dtype == torch.bfloat16}
    assert {f"blocks.1.mlp.routed.experts.w{i}" for i in (1, 2)} | {"blocks.0.attn.proj.weight"} <= half
    assert not {name for name in half if "router" in name or "y_embedder" in name}
    for name, grad in wide.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, narrow[name].float()), name


def test_outside_the_context_and_after_it_weights_are_cast_anew() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    assert cast_weight(w, torch.float32) is w and cast_weight(w, torch.bfloat16) is not cast_weight(w, torch.bfloat16)
    with cast_once():
        copy = cast_weight(w, torch.bfloat16)
        assert cast_weight(w, torch.bfloat16) is copy
        assert cast_weight(w * 2, torch.bfloat16).tolist() == [2, 2], "not a parameter"
        with torch.no_grad():
            assert cast_weight(w, torch.bfloat16) is not copy, "it has no graph"
    with torch.no_grad():
        w.fill_(3)
    with cast_once():
        assert cast_weight(w, torch.bfloat16).tolist() == [3, 3]


def test_another_threads_autocast_costs_no_cast() -> None:
    """On CUDA the backward pass has a thread of its own; the end of an autocast there clears what torch has cached."""

    def elsewhere() -> None:
        with torch.autocast("cpu", enabled=False):
            pass

    model = drawn(load_config("tiny", ["moe=null"]))
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 500.0), torch.arange(4)
    with Casts(model) as casts, cast_once():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(x, t, y).prediction.float().square().mean().backward()
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
    products = {name: number for name, number in casts.count.items() if "blocks" in name and name.endswith("weight")}
    assert products and set(products.values()) == {1}


@pytest.mark.parametrize("any_dtype", [False, True])
def test_the_graph_alone_holds_copies_that_are_let_go(any_dtype: bool) -> None:
    """Half of the weights, beside gradients that grow: a copy is gone when the gradients of its product are made."""
    weights, left = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(3)], []
    with cast_once():
        x = torch.ones(2, 8, dtype=torch.bfloat16)
        for weight in weights:
            weight.grad_dtype = None if any_dtype else torch.float32
            weight.register_post_accumulate_grad_hook(lambda _: left.append(sum(copy() is not None for copy in copies)))
            x = x @ cast_weight(weight, torch.bfloat16)
        copies = [weakref.ref(cast_weight(weight, torch.bfloat16)) for weight in weights]
        x.sum().backward(retain_graph=True)
        assert left == [3, 3, 3]
        let_go()
        x.sum().backward()
        del x
    assert left[3:] == sorted(left[3:], reverse=True) and left[-1] < 3
    assert not any(copy() is not None for copy in copies)


def arrivals(model: DiT, micro_batches: int, renewed: bool) -> tuple[list[str], list[Tensor]]:
    """Names of weights in the order in which the last micro-batch's gradients arrive, and the gradients of all."""
    order: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    x, t, y = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), torch.full((4,), 500.0), torch.arange(4)
    with Casts(model) as casts, cast_once():
        for _ in range(micro_batches):
            order.clear()
            if renewed:
                renew()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x, t, y)
            out.prediction.float().square().mean().backward()
    large = [n for n in casts.count if "blocks" in n and n.endswith("mlp.fc1.weight")]
    assert large and all(casts.count[n] == 1 for n in large), "renewed copies are not made again"
    return order, [p.grad for p in model.parameters() if p.grad is not None]


def test_renewed_copies_do_not_hold_up_gradients() -> None:
    """What is to be reduced beside the backward pass must arrive in it, as without copies, from the last layer on."""
    config = load_config("tiny", ["moe=null"])
    (first, _), (late, theirs), (again, ours) = (
        arrivals(drawn(config), *how) for how in ((1, False), (2, False), (2, True))
    )
    blocks = [name for name in first if "blocks" in name and name.endswith("qkv.weight")]
    embedder = "x_embedder.proj.weight"
    assert late.index(embedder) < late.index(blocks[0]), "what this is about"
    assert again.index(embedder) > again.index(blocks[-1])
    assert [name for name in again if name in blocks] == blocks
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
