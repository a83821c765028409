"""Speed of the MoE layer, of the training step and of sampling, against peers, in one run.

    make bench-gpu                                                  # everything below on one GPU, in 8 minutes
    python benchmarks/throughput.py --section step --sizes s --micro 8 --precision fp32 --threads 2
    python benchmarks/throughput.py --section layer --sizes s,xl --routing learned,uniform,skewed
    python benchmarks/throughput.py --table                         # only print what was measured before

Systems take turns, a window each, several rounds; a figure is the median over the rounds, with the lowest and the
highest. Weights and inputs are random, so no files are needed. Points already measured are skipped (`--fresh` forgets
them), and none is begun after `--minutes`. The table is printed last.

The training step here is forward, backward, gradient norm with clipping, fused AdamW and the EMA, without DeepSpeed's
engine and without data loading: the same for every system. `promoe paper loop` is Algorithm 1 of the paper on the
parameters of `promoe`;
`dense` is Dense-DiT at the same activated size; `compiled` is with `train.compile`. benchmarks/moe_peers.py has the
peers, and what they leave out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import moe_peers, throughput_table
from benchmarks.interleaved import Clock, Work, interleaved
from benchmarks.op_counting import count_operators, host_syncs
from benchmarks.provenance import facts, provenance
from benchmarks.throughput_options import arguments
from promoe_ds.config.schema import Config, reject
from promoe_ds.costs import flops
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.compiled import compile_model, compile_whole
from promoe_ds.models.init import build
from promoe_ds.moe.dispatch import segment_sizes
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import RoutingContext, auxiliary_losses
from promoe_ds.parallel.optimizer import AdamWithEMA
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import How, draw_pixels
from promoe_ds.utils.command_line import launcher
from promoe_ds.utils.files import write_text

NULL, DROP = moe_peers.NULL_LABEL, 0.1
PARTS = ("forward", "backward", "optimizer")
FACTS = "facts.json"
"""commit, versions, device and rounds of each point"""


# ---------------------------------------------------------------------------------------------------------- material


def make_model(config: Config, device: torch.device) -> Any:
    """Weights N(0, 0.02), drawn on the device: adaLN is awake, and XL is there in a second."""
    model = build(config).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)
    return model.train()


def twin(model: Any) -> Any:
    """Another model on the same parameters: it takes no memory."""
    other = build(model.config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.train()


def optimizer(model: Any) -> AdamWithEMA:
    return AdamWithEMA([p for p in model.parameters() if p.requires_grad], model.config.optimizer)


def labels(images: int) -> Tensor:
    """A tenth of the images without label, at least one."""
    label_B = torch.arange(images) % NULL
    label_B[: max(1, round(images * DROP))] = NULL
    return label_B


def context(images: int, device: torch.device) -> RoutingContext:
    return RoutingContext.build(labels(images), NULL, device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def train_step(model: Any, adam: AdamWithEMA, images: int, device: torch.device, precision: str) -> Work:
    """Forward, backward and update of a whole model; the state of the optimizer is made at the first call."""
    objective, m = make_objective(model.config.diffusion, device), model.config.model
    z, eps = (torch.randn(images, m.channels, m.image_size, m.image_size, device=device) for _ in range(2))
    gauss, host = torch.randn(images, device=device), labels(images)

    def work(clock: Clock) -> None:
        clock.mark()
        ctx = RoutingContext.build(host, NULL, device)
        with autocast(device, precision):
            output, losses = objective.loss(lambda x, t: model(x, t, ctx), z, eps, gauss)
        total = losses["diffusion"] + sum(loss_L.sum() for loss_L in output.aux.values())
        clock.mark()
        total.backward()
        clock.mark()
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 0.5)
        adam.step()
        adam.zero_grad(set_to_none=True)
        clock.mark()

    return work


def layer_step(module: nn.Module, step: moe_peers.Step, x: Tensor, precision: str) -> Work:
    """Forward and backward of one layer, gradients of its parameters and of its input."""

    def work(clock: Clock) -> None:
        clock.mark()
        with autocast(x.device, precision):
            y, aux = step(x)
        clock.mark()
        torch.autograd.backward(
            [y, *([aux] if aux is not None else [])], [probe.to(y.dtype), None][: 1 + (aux is not None)]
        )
        for p in (x, *module.parameters()):
            p.grad = None
        clock.mark()

    probe = torch.randn_like(x)
    return work


# ---------------------------------------------------------------------------------------------------------- sections


def with_backend(layer: Any, backend: str) -> moe_peers.Step:
    def step(x: Tensor) -> tuple[Tensor, Tensor | None]:
        layer.routed.experts.backend = backend
        y, (terms, end_E, _) = layer(x, ctx)
        return y, auxiliary_losses(layer.router, [terms], segment_sizes(end_E)[None], ctx)["routing_contrastive"].sum()

    ctx = layer.bench_context
    return step


def layer_systems(config: Config, images: int, precision: str, routing: str, device: torch.device) -> dict[str, Work]:
    layer: Any = make_model_layer(config, device)
    moe_peers.force_routing(layer, routing)
    x = torch.randn(images, config.model.tokens, config.model.width, device=device, requires_grad=True)
    ctx = layer.bench_context = context(images, device)

    def loop(x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, (losses, _, _) = moe_peers.loop_layer(layer, x, ctx)
        return y, losses["routing_contrastive"]

    systems = {
        f"promoe {name}": layer_step(layer, with_backend(layer, name), x, precision) for name in backends(device)
    }
    if routing == "learned":
        compiled: Any = compile_whole(copy.deepcopy(layer))
        systems["promoe compiled"] = layer_step(compiled, with_backend(compiled, "grouped_mm"), x, precision)
    systems["paper loop"] = layer_step(layer, loop, x, precision)
    with autocast(device, precision):
        gemms = moe_peers.gemms_alone(layer, x, ctx)

    def floor(clock: Clock) -> None:
        clock.mark()
        gemms()
        clock.mark()
        clock.mark()

    systems["gemms alone"] = floor
    if routing == "learned":
        hidden, experts = flops.expert_hidden(config), config.moe.num_experts  # type: ignore[union-attr]
        for name, make in (("deepspeed", moe_peers.deepspeed_layer), ("megablocks", moe_peers.megablocks_layer)):
            try:
                step, module = make(config.model.width, hidden, experts, device)
                systems[name] = layer_step(module, step, x, precision)
            except ImportError as error:
                print(f"  {name} is left out: {error}", flush=True)
    return systems


def backends(device: torch.device) -> list[str]:
    from promoe_ds.moe.experts import backend_problem

    return [name for name in ("grouped_mm", "loop", "megablocks") if backend_problem(name, device.type) is None]


def make_model_layer(config: Config, device: torch.device) -> MoELayer:
    layer = MoELayer(config).to(device)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.02)
    return layer


def layers(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for routing in args.routing:
        for size, micro, precision in points(args):
            config = load_config(f"imagenet256_promoe_{size}")
            name = f"{size} {precision} micro {micro} {routing}"
            yield (
                name,
                lambda c=config, m=micro, p=precision, r=routing: interleaved(
                    layer_systems(c, m, p, r, args.device), args.device, args.rounds, 2
                ),
            )


def points(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    for precision in args.precision:
        for size in args.sizes:
            for micro in args.micro:
                if micro == args.micro[0] or size in (args.sizes[0], args.sizes[-1]):  # a list for the ends alone
                    yield size, micro, precision


def step_systems(size: str, images: int, precision: str, device: torch.device) -> dict[str, Work]:
    dense, promoe = (make_model(load_config(f"imagenet256_{name}_{size}"), device) for name in ("dense", "promoe"))
    adams = {"dense": optimizer(dense), "promoe": optimizer(promoe)}
    step = train_step(promoe, adams["promoe"], images, device, precision)

    def variant(backend: str, loop: bool) -> Work:
        def work(clock: Clock) -> None:
            moe_peers.use_loop(promoe, loop)
            for block in promoe.blocks:
                if isinstance(block.mlp, MoELayer):
                    block.mlp.routed.experts.backend = backend
            step(clock)

        return work

    systems = {"dense": train_step(dense, adams["dense"], images, device, precision)}
    systems |= {f"promoe {name}": variant(name, False) for name in backends(device)}
    for name, model in (("dense", dense), ("promoe", promoe)):
        systems[f"{name} compiled"] = train_step(compile_model(twin(model)), adams[name], images, device, precision)
    return systems | {"promoe paper loop": variant("loop", True)}


def steps(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for size, micro, precision in points(args):
        name = f"{size} {precision} micro {micro}"
        yield (
            name,
            lambda s=size, m=micro, p=precision: interleaved(
                step_systems(s, m, p, args.device), args.device, args.rounds, len(PARTS)
            ),
        )


def counts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Operators of a forward pass and host syncs of forward and backward, 4 images of 64 tokens."""

    def one(size: str) -> dict[str, Any]:
        out = {}
        for name, recipe, loop in (
            ("dense", "dense", False),
            ("promoe", "promoe", False),
            ("paper loop", "promoe", True),
        ):
            config = load_config(f"imagenet256_{recipe}_{size}", ["model.image_size=16"])
            model = make_model(config, args.device)
            moe_peers.use_loop(model, loop)
            x, t = torch.randn(4, 4, 16, 16, device=args.device), torch.rand(4, device=args.device) * 1000
            ctx = context(4, args.device)
            output: Any = None

            def forward(model: Any = model, x: Tensor = x, t: Tensor = t, ctx: RoutingContext = ctx) -> Any:
                return model(x, t, ctx)

            def both(forward: Any = forward) -> None:
                output = forward()
                (output.prediction.square().mean() + sum(loss_L.sum() for loss_L in output.aux.values())).backward()

            both()
            output = forward()
            total = output.prediction.square().mean() + sum(loss_L.sum() for loss_L in output.aux.values())
            backward = count_operators(total.backward)
            with torch.no_grad():
                train = count_operators(forward)
                model.eval()
                infer = count_operators(forward)
            model.train()
            out[name] = {"evaluation": infer.total, "training": train.total, "kernels": train.kernels,
                         "backward": backward.total, "syncs": host_syncs(both, args.device)}  # fmt: skip
        return out

    for size in args.sizes:
        yield size, lambda s=size: one(s)


def samples(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Euler with guidance 1.5, both halves in one forward; the time of a step is measured, 250 make an image."""

    def one(size: str) -> dict[str, Any]:
        device, images, out = args.device, args.sample_batch, {}
        for name in ("dense", "promoe"):
            config = load_config(f"imagenet256_{name}_{size}")
            model = make_model(config, device).eval()

            def work(clock: Clock, model: Any = model, config: Config = config) -> None:
                clock.mark()
                labels, rows = np.arange(images) % 1000, np.arange(images)
                precision = "bf16" if device.type == "cuda" else "fp32"
                how = How(1.5, args.sample_steps, batch=images, precision=precision)
                with torch.no_grad():
                    draw_pixels(model, config, labels, rows, how, device)
                clock.mark()

            out |= interleaved({name: work}, device, args.rounds, 1)
        return out | {"images": images, "steps": args.sample_steps}

    for size in dict.fromkeys((args.sizes[0], args.sizes[-1])):
        yield size, lambda s=size: one(s)


SECTIONS = {"counts": counts, "step": steps, "layer": layers, "sampling": samples}


def measure(args: argparse.Namespace) -> None:
    """Every point of the chosen sections that has no result yet, until the time is over."""
    end, here = time.monotonic() + 60 * args.minutes, facts() | {"rounds": str(args.rounds)}
    forget = args.section if args.fresh else []
    figures = {name: {} if name in forget else load_json(args.out / f"{name}.json") for name in SECTIONS}
    known = load_json(args.out / FACTS)
    for section in args.section:
        done = figures[section]
        for name, work in SECTIONS[section](args):
            if name in done:
                continue
            if time.monotonic() > end:
                print(f"{section} {name}: no time left; run again to go on", flush=True)
                continue
            start = time.monotonic()
            done[name] = work()
            print(f"{section} {name}: {time.monotonic() - start:.0f} s", flush=True)
            known[f"{section} {name}"] = here
            write_text(args.out / f"{section}.json", json.dumps(done, indent=1) + "\n")
            write_text(args.out / FACTS, json.dumps(known, indent=1) + "\n")
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


def load_json(path: Path) -> dict[str, Any]:
    """What the file holds, nothing if it is not there. Raises `ConfigError` for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        reject("--out", path, f"is damaged ({error})", "remove the file, or forget its section with --fresh")


def head(folder: Path, words: list[str]) -> str:
    """Where the figures in the folder come from: one row a kind of fact, of all points that are there now."""
    points = {f"{name} {point}" for name in SECTIONS for point in load_json(folder / f"{name}.json")}
    if not points:
        reject("--out", folder, "holds no figures", "run without --table")
    known, unknown = load_json(folder / FACTS), dict.fromkeys(("commit", "versions", "device", "rounds"), "unknown")
    return provenance("benchmarks/throughput.py", words, [known.get(point, unknown) for point in sorted(points)])


def run(words: list[str]) -> None:
    args = arguments(str(__doc__), words)
    torch.manual_seed(0)
    if args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        measure(args)
    page = throughput_table.page(args.out, head(args.out, words), args.device)
    write_text(args.page, page + "\n")
    print(page)


if __name__ == "__main__":
    _, console = launcher(run)
    console()
