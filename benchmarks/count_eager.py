"""Operators and bytes of one training step in eager mode, by kind, without computing anything.

    python benchmarks/count_eager.py xl 64            ProMoE-XL beside Dense-XL, micro-batch 64, bf16 autocast

Forward and backward run on fake tensors, shapes and types without memory, with the kernels that CUDA has. An
operator's bytes are those of its inputs and outputs, as if no cache held them. Views are free. The optimizer is not
counted: `docs/performance.md` has it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import table
from benchmarks.throughput import labels
from promoe_ds.models import dit
from promoe_ds.moe import fused
from promoe_ds.moe.conditional_routing import split_by_label
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import Parser, check_positive, launcher

FREE = frozenset(
    "_unsafe_view alias as_strided detach diagonal expand narrow permute select slice split split_with_sizes squeeze t "
    "transpose unbind unsqueeze view lift_fresh _reshape_alias device arange "
    "empty empty_like empty_strided new_empty".split()
)
WRITE_ONLY = frozenset("copy_ zero_ fill_".split())
"""in place, without reading what was there"""
PRODUCTS = frozenset("mm addmm addmm_ bmm baddbmm _grouped_mm".split())


def nbytes(x: Tensor) -> int:
    """Of distinct elements: an expanded dimension counts once."""
    expanded = (size for stride, size in zip(x.stride(), x.shape, strict=True) if stride == 0 and size > 1)
    number = x.numel()
    for size in expanded:
        number //= size
    return number * x.element_size()


class Traffic(TorchDispatchMode):
    """While the context is open: operators and their bytes by (kind, name); kinds are product, attention, memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            kind = "product" if name in PRODUCTS else "attention" if "scaled_dot" in name else "memory"
            passed = (args, kwargs) if name in WRITE_ONLY else (args, kwargs, out)
            tensors = [x for x in tree_leaves(passed) if isinstance(x, Tensor)]
            self.number[kind, name] += 1
            self.bytes[kind, name] += sum(map(nbytes, tensors))
        return out

    def total(self, kind: str) -> tuple[int, int]:
        """Operators and bytes of a kind."""
        keys = [key for key in self.number if key[0] == kind]
        return sum(self.number[key] for key in keys), sum(self.bytes[key] for key in keys)


def count(recipe: str, images: int, overrides: tuple[str, ...] = (), on_cuda: bool = True) -> Traffic:
    """Forward and backward of a training step, as on CUDA or as on a CPU."""
    config, y_B = load_config(recipe, overrides), labels(images)
    m = config.model
    split = split_by_label(y_B, m.num_classes, "cpu")  # reads labels, which must be real
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(dit, "split_by_label", return_value=split),
        mock.patch.object(fused, "fusible", return_value=on_cuda),
    ):
        model = dit.DiT(config).train()
        x, t = torch.empty(images, m.channels, m.image_size, m.image_size), torch.empty(images)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x, t, y_B)
            total = output.prediction.float().square().mean()
            (total + sum(loss_L.sum() for loss_L in output.aux_losses.values())).backward()
    return traffic


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("s", "b", "l", "xl"))
    parser.add_argument("images", type=int)
    parser.add_argument("--largest", type=int, default=0, metavar="N", help="also the N largest operators of ProMoE")
    args = parser.parse_args(words)
    check_positive(args, "images")
    rows, found = [], {}
    for name in ("promoe", "dense"):
        found[name] = traffic = count(f"imagenet256_{name}_{args.size}", args.images)
        for kind in ("product", "attention", "memory"):
            number, size = traffic.total(kind)
            rows.append([name, kind, number, f"{size / 1e9:.1f}"])
    print(table(["model", "kind", "operators", "GB"], rows))
    if args.largest:
        traffic = found["promoe"]
        largest = traffic.bytes.most_common(args.largest)
        listed = ((*key, traffic.number[key], f"{size / 1e9:.2f}") for key, size in largest)
        print("\n" + table(["kind", "operator", "times", "GB"], listed))


if __name__ == "__main__":
    _, console = launcher(run)
    console()
