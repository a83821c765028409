"""Bytes that the backward pass is left with by a forward pass, counted, beside what `--dry-run` predicts.

    OMP_NUM_THREADS=2 python benchmarks/activation_bytes.py --out benchmarks/results/activation_memory.md
    python benchmarks/activation_bytes.py --sizes s --modes none,compiled --precision fp32

Counted are storages that still live after a forward pass on the CPU: per image, the slope over the batch, so that
copies of weights cancel. A model's bytes are put together from models of one dense block, of two, and of one of each
kind. To the modes `block` and `selective` comes one block without them, as the backward pass makes it anew. A compiled
graph allocates unseen, so there autograd's own list counts (`saved_tensors_hooks`).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import page, table, words_of
from promoe_ds.config.schema import Config
from promoe_ds.costs import flops
from promoe_ds.models.compiled import compile_model
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import Parser, launcher
from promoe_ds.utils.files import write_text

SIZES, MODES = ("s", "b", "l", "xl"), ("none", "selective", "block", "compiled")
FAMILIES = "dense", "promoe"
BEFORE = {"dense": 55.15, "promoe": 60.98}
"""MiB per image of size S when everything was kept (commit 3a70af0), bf16 autocast"""


class Alive(TorchDispatchMode):
    """Storages made while the context is open, and how many bytes of them still live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Storages that autograd saves while the context is open, those of `model` left out."""

    def __init__(self, model: DiT) -> None:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                self.kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
            return x

        super().__init__(pack, lambda x: x)

    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.kept.values())


def kept(model: DiT, images: int, saved: bool = False) -> int:
    """Bytes that live after a forward pass on `images` images, all labelled, because the graph holds them.

    Args:
        saved: count what autograd saves instead; it does not see into checkpoints.
    """
    m = model.config.model
    x_BCHW, t_B = torch.zeros(images, m.channels, m.image_size, m.image_size), torch.full((images,), 500.0)
    mixed = model.config.train.precision == "bf16_autocast"
    count = Saved(model) if saved else Alive()
    with count, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(x_BCHW.to(next(model.parameters()).dtype), t_B, torch.arange(images) % m.num_classes)
    size = count.bytes()
    assert out.prediction.requires_grad
    return size


def make(config: Config) -> DiT:
    model = build(config).to_empty(device="cpu").train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model.bfloat16() if config.train.precision == "bf16" else model


@cache
def slope(config: Config, compiled: bool) -> float:
    """Bytes per image."""
    torch._dynamo.reset()
    model = make(config)
    if compiled:
        compile_model(model)
    few, many = (kept(model, images, saved=compiled) for images in (2, 4))
    return (many - few) / 2


def counted(config_of: Callable[..., Config], mode: str) -> float:
    """Bytes per image of the whole model, from blocks of each kind.

    Args:
        config_of: overrides -> configuration.
        mode: one of MODES.
    """
    whole, checkpointing = config_of(), "none" if mode == "compiled" else mode

    moe_layers = len(whole.moe_layers())
    numbers = {False: whole.model.depth - moe_layers, True: moe_layers}

    def of(moe: int, dense: int, checkpointing: str = checkpointing) -> float:
        layers = [f"moe.layers={list(range(moe))}" if moe else "moe=null"] if whole.moe else []
        overrides = [f"model.depth={moe + dense}", f"train.activation_checkpointing={checkpointing}", *layers]
        return slope(config_of(*overrides), mode == "compiled")

    def block(is_moe: bool, *checkpointing: str) -> float:
        return of(is_moe, 2 - is_moe, *checkpointing) - of(0, 1, *checkpointing)

    total = of(0, 1) - block(False) + sum(number * block(is_moe) for is_moe, number in numbers.items() if number)
    if mode in ("block", "selective"):
        total += max(block(is_moe, "none") for is_moe, number in numbers.items() if number)
    return total


def rows(args: argparse.Namespace) -> list[list[str]]:
    out = []
    for family in FAMILIES:
        for size in args.sizes:
            for mode in args.modes:
                more = [f"train.precision={args.precision}", f"train.compile={str(mode == 'compiled').lower()}"]

                def config_of(*overrides: str, family: str = family, size: str = size, more: Any = more) -> Config:
                    return load_config(f"imagenet256_{family}_{size}", [*more, *overrides])

                found = counted(config_of, mode) / 2**20
                checkpointing = f"train.activation_checkpointing={'none' if mode == 'compiled' else mode}"
                predicted = flops.activation_bytes(config_of(checkpointing), 1) / 2**20
                today = size == "s" and args.precision == "bf16_autocast"
                over = f"{found / BEFORE['dense']:.2f}" if today else ""
                out.append([family, size.upper(), mode, f"{found:.2f}", f"{predicted:.2f}",
                            f"{predicted / found - 1:+.1%}", over])  # fmt: skip
                print(*out[-1], flush=True)
    return out


def run(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--sizes", type=words_of(*SIZES), default=list(SIZES), help="of s, b, l, xl")
    parser.add_argument("--modes", type=words_of(*MODES), default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--precision", choices=("fp32", "bf16_autocast", "bf16"), default="bf16_autocast")
    parser.add_argument("--out", type=Path, help="result page to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    columns = ["family", "size", "mode", "MiB per image", "predicted", "difference", "over Dense-S before"]
    found = table(columns, rows(args))
    if args.out:
        program = "benchmarks/activation_bytes.py"
        write_text(args.out, page("Activation memory", program, argv, found))
    print(found)


if __name__ == "__main__":
    _, console = launcher(run)
    console()
