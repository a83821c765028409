"""Kernels and bytes that inductor would make of a block for an H100, without one.

    python benchmarks/count_compiled.py xl 64         blocks of ProMoE-XL, micro-batch 64, bf16 autocast
    python benchmarks/count_compiled.py xl 64 --largest 20

A block is traced on the CPU, and its graphs are lowered as for CUDA of compute capability 9.0, up to the choice of
kernels: nothing is generated or run. Attention stays the CPU's operator, one kernel with the same inputs and outputs. A
kernel's bytes are those of the buffers it reads and writes.

Outside the graphs weights are cast, once per optimizer step, and their gradients in each micro-batch, but not where
DeepSpeed's buckets take them as they are: at ZeRO 2, and at ZeRO 1 with one micro-batch per step.

This reaches into the compiler, and needs Triton, which torch's CPU builds lack: its package is enough. It was written
for torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import Tensor

from benchmarks.common import table
from benchmarks.throughput import split_of
from promoe_ds.config.errors import reject
from promoe_ds.models.compiled import compile_whole, products
from promoe_ds.models.dit import DiTBlock
from promoe_ds.moe import fused
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import Parser, check_positive, launcher

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="", uuid="",
)  # fmt: skip
PARTS = {
    "forward and backward": ("forward", "backward"),
    "gradients of weights to fp32, where they are cast": ("their gradients",),
    "weights, once per optimizer step": ("weights, per step",),
}
"""what is printed of all blocks, and the passes in it"""


class Kernels:
    """Of the graphs of one block: number and bytes by (pass, kind); and each with its result, for `--largest`."""

    def __init__(self) -> None:
        self.number: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.each: list[tuple[int, str, str, str]] = []

    def add_casts(self, block: torch.nn.Module) -> None:
        """Of weights and their gradients, outside the graphs; torch casts this many elements in one launch."""
        elements = sum(p.numel() for layer in products(block) for p in layer.parameters(recurse=False))
        for where in ("weights, per step", "their gradients"):
            self.number[where, "memory-bound"] = -(-elements // (320 * 65536))
            self.bytes[where, "memory-bound"] = 6 * elements

    def add(self, scheduled: Any, where: str) -> None:
        kind = type(scheduled).__name__
        if "Nop" in kind:
            return
        name = "reduction" if scheduled.is_reduction() else "pointwise"
        if "Extern" in kind:
            name = str(getattr(scheduled.node, "python_kernel_name", None) or "")
            if not name:  # one of several results of the kernel before
                return
        ours = "promoe_ds_fused" in name  # kernels of `moe/triton_kernels.py`
        group = "memory-bound" if "Extern" not in kind or ours else "others'"
        size = scheduled.get_read_write_buffers_sizes()
        self.number[where, group] += 1
        self.bytes[where, group] += size
        layouts: list[Any] = [getattr(buffer.node, "layout", None) for buffer in scheduled.get_outputs()[:3]]
        results = ", ".join(f"{str(x.dtype)[6:]}{list(map(int, x.size))}" for x in layouts if hasattr(x, "dtype"))
        self.each.append((size, where, name, results))


def pretend() -> None:
    """Let the compiler see one H100."""
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *_, **__: H100
    cuda.get_device_capability = lambda *_, **__: (H100.major, H100.minor)
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
    fused.fusible = lambda _: True
    import torch._inductor.config as inductor  # not before: it keeps the functions it finds
    import torch._inductor.fx_passes.reinplace as reinplace
    import torch._inductor.scheduler as scheduler

    scheduler.has_triton = lambda *_, **__: True  # type: ignore[attr-defined]
    # what it returns is its first argument; on the way it copies, which a torch for CPUs does not do on CUDA
    reinplace._inplace_generalized_scatter = lambda whole, part, views: whole
    inductor.compile_threads, inductor.fx_graph_cache = 1, False


def on_cuda(graph: Any, inputs: list[Any]) -> tuple[Any, list[Any], Any]:
    """The graph with fake tensors of CUDA in the place of the CPU's, its inputs, and the mode they belong to."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils._pytree import tree_map

    cuda, mode = torch.device("cuda", 0), FakeTensorMode(allow_non_fake_inputs=True)

    def moved(x: Any) -> Any:
        if isinstance(x, torch.device):
            return cuda
        if isinstance(x, Tensor):
            shape, stride = (tuple(int(n) for n in of) for of in (x.shape, x.stride()))
            return torch.empty_strided(shape, stride, dtype=x.dtype, device=cuda)
        return x

    graph = copy.deepcopy(graph)
    with mode:
        fake = [moved(x) for x in inputs]
        for node in graph.graph.nodes:
            devices = lambda x: cuda if isinstance(x, torch.device) else x  # noqa: E731
            node.args, node.kwargs = tree_map(devices, node.args), tree_map(devices, node.kwargs)
            node.meta.pop("val", None)
            if node.op == "get_attr":
                setattr(graph, node.target, moved(getattr(graph, node.target)))
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fake)
    return graph, fake, mode


def lower(graph: Any, inputs: list[Any], backward: bool, kernels: Kernels) -> None:
    """Inductor's way from a graph to its kernels, up to code generation."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graph, fake, mode = on_cuda(graph, inputs)
    context = tracing(TracingContext(mode))
    with context, V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        view_to_reshape(graph)
        _recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=fake, is_backward=backward, layout_opt=False)
        with V.set_graph_handler(lowering):
            lowering.run(*fake)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            for scheduled in lowering.scheduler.nodes:
                kernels.add(scheduled, "backward" if backward else "forward")


def counting(kernels: Kernels) -> Callable[..., Any]:
    """A backend of torch.compile that counts, and returns empty tensors."""
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch.utils._python_dispatch import _disable_current_modes

    def partition(graph: Any, inputs: Any, **more: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **more)

    def compiler(backward: bool) -> Callable[..., Any]:
        def compile(graph: Any, inputs: list[Any]) -> Any:
            with _disable_current_modes():
                lower(graph, inputs, backward, kernels)
            (output,) = (node for node in graph.graph.nodes if node.op == "output")
            results = [node.meta["val"] if hasattr(node, "meta") else node for node in output.args[0]]
            return make_boxed_func(lambda *_: tuple(empty(x) if isinstance(x, Tensor) else x for x in results))

        return compile

    return lambda graph, inputs: aot_module_simplified(
        graph,
        inputs,
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )


def empty(x: Tensor) -> Tensor:
    return torch.empty_strided([int(n) for n in x.shape], [int(n) for n in x.stride()], dtype=x.dtype)


def count(size: str, images: int, is_moe: bool) -> Kernels:
    """Forward and backward of one block of `imagenet256_promoe_SIZE`."""
    torch.compiler.reset()
    config, kernels = load_config(f"imagenet256_promoe_{size}"), Kernels()
    m, block = config.model, DiTBlock(config, is_moe).train()
    compile_whole(block, counting(kernels))
    x = torch.randn(images, m.tokens, m.width, requires_grad=True)
    c = torch.randn(images, m.width, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, stats = block(x, c, c, split_of(images, torch.device("cpu")))
    total = y.sum()
    if stats is not None:
        total = total + sum(term.sum() for term in stats.terms.values()) + stats.weight_N.sum()
    total.backward()
    kernels.add_casts(block)
    return kernels


def run(words: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("s", "b", "l", "xl"))
    parser.add_argument("images", type=int)
    parser.add_argument(
        "--largest", type=int, default=0, metavar="N", help="also the N largest kernels of an MoE block"
    )
    args = parser.parse_args(words)
    check_positive(args, "images")
    if importlib.util.find_spec("triton") is None:
        reject("torch", torch.__version__, "comes without Triton", "install the CUDA build of torch; it needs no GPU")
    pretend()
    dense, moe = (count(args.size, args.images, is_moe) for is_moe in (False, True))
    config = load_config(f"imagenet256_promoe_{args.size}")
    depth, layers, rows = config.model.depth, len(config.moe_layers()), []
    for name, kernels in (("dense", dense), ("MoE", moe)):
        for (where, group), number in kernels.number.items():
            rows.append([name, where, group, number, f"{kernels.bytes[where, group] / 1e9:.3f}"])
    print(table(["block", "pass", "kernels", "number", "GB"], rows))
    print("\nmemory-bound GB of all blocks:")
    for name, of in PARTS.items():
        each, other = (sum(k.bytes[where, "memory-bound"] for where in of) / 1e9 for k in (dense, moe))
        print(f"{name}: ProMoE {(depth - layers) * each + layers * other:.1f}, Dense {depth * each:.1f}")
    if args.largest:
        largest = sorted(moe.each, reverse=True)[: args.largest]
        print("\n" + table(["GB", "pass", "kernel", "results"], ((f"{b / 1e9:.3f}", *of) for b, *of in largest)))


if __name__ == "__main__":
    _, console = launcher(run)
    console()
