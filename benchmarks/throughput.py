"""Speed of the MoE layer, of the training step and of sampling against peers, on a machine shared with others.

    OMP_NUM_THREADS=2 python benchmarks/throughput.py --section step --sizes s --micro 8 --precision fp32
    python benchmarks/throughput.py --section layer --sizes s,xl --routing learned,uniform,skewed
    python benchmarks/throughput.py --section step --official ../ProMoE --systems "promoe [gc]|official"
    python benchmarks/throughput.py --minutes 0                     # only print what was measured before

Systems take turns, a window each, several rounds; a figure is the median over the rounds, with the lowest and the
highest. Weights and inputs are random, so no files are needed. Points already measured are skipped (remove --out to
forget them), and none is begun after --minutes. The table is printed last.

The training step here is forward, backward, gradient norm with clipping, fused AdamW and the EMA, without DeepSpeed's
engine and without data loading: the same for every system. `promoe paper loop` is Algorithm 1 of the paper on the
parameters of `promoe`; `dense` is Dense-DiT at the same activated size; `compiled` is with `train.compile`.
`official code` is a clone of ali-vilab/ProMoE on the same weights and batch (--official), by the loop of its train.py.
benchmarks/moe_peers.py has the peers, and what they leave out. A GPU's memory, kernels and ceilings are the business of
`python -m benchmarks.gpu`, which measures each model alone.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import moe_peers
from benchmarks.common import facts, integers, load_points, page, save_point, spread, table, words_of
from benchmarks.interleaved import Clock, Work, interleaved
from benchmarks.official_model import official_step, official_twin
from promoe_ds.config.errors import reject
from promoe_ds.costs import flops
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.compiled import compile_model, compile_whole
from promoe_ds.models.init import build
from promoe_ds.moe.conditional_routing import Split, split_by_label
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.experts import StackedExperts, backend_problem
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import aux_losses_of
from promoe_ds.parallel.adamw_ema import AdamWithEMA
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import Parser, check_positive, launcher
from promoe_ds.utils.files import write_text

NULL, DROP = moe_peers.NULL_LABEL, 0.1
SAMPLER_STEPS, TIMED_STEPS = 250, 4


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """N(0, 0.02) for every parameter, so that adaLN does something."""
    for p in module.parameters():
        p.normal_(0, 0.02)


def make_model(recipe: str, device: torch.device, *overrides: str) -> Any:
    model = build(load_config(f"imagenet256_{recipe}", overrides)).to_empty(device=device)
    draw_weights(model)
    return model.train()


def twin(model: Any) -> Any:
    """Another model on the same parameters: it takes no memory."""
    other = build(model.config)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.train()


def labels(images: int) -> Tensor:
    """A tenth of the images without label, at least one."""
    label_B = torch.arange(images) % NULL
    label_B[: max(1, round(images * DROP))] = NULL
    return label_B


def split_of(images: int, device: torch.device) -> Split:
    return split_by_label(labels(images), NULL, device)


def backends(device: torch.device) -> list[str]:
    return [name for name in ("grouped_mm", "loop", "megablocks") if backend_problem(name, device.type) is None]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Images(NamedTuple):
    """A batch, the same for every system."""

    x_BCHW: Tensor
    noise_BCHW: Tensor
    gauss_B: Tensor
    label_B: Tensor


def images_of(model: Any, images: int, device: torch.device) -> Images:
    m, generator = model.config.model, torch.Generator(device).manual_seed(0)
    shape = images, m.channels, m.image_size, m.image_size
    x, noise = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    return Images(x, noise, torch.randn(images, device=device, generator=generator), labels(images))


def train_step(model: Any, adam: AdamWithEMA, images: int, device: torch.device, precision: str) -> Work:
    """Forward, backward and update of a whole model; the state of the optimizer is made at the first call."""
    objective, batch = make_objective(model.config.diffusion, device), images_of(model, images, device)

    def work(clock: Clock) -> None:
        clock.mark()
        with autocast(device, precision):
            output, losses = objective.loss(lambda x, t: model(x, t, batch.label_B), *batch[:3])
        total = losses["diffusion"] + sum(loss_L.sum() for loss_L in output.aux_losses.values())
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
    probe = torch.randn_like(x)

    def work(clock: Clock) -> None:
        clock.mark()
        with autocast(x.device, precision):
            y, aux = step(x)
        clock.mark()
        torch.autograd.backward([y, aux], [probe.to(y.dtype), None])
        for p in (x, *module.parameters()):
            p.grad = None
        clock.mark()

    return work


def step_systems(
    size: str, images: int, precision: str, official: Path | None, device: torch.device
) -> dict[str, Work]:
    dense, promoe = (make_model(f"{name}_{size}", device) for name in ("dense", "promoe"))
    adams = {
        name: AdamWithEMA([p for p in model.parameters() if p.requires_grad], model.config.optimizer)
        for name, model in (("dense", dense), ("promoe", promoe))
    }
    step = train_step(promoe, adams["promoe"], images, device, precision)

    def variant(backend: str, loop: bool) -> Work:
        def work(clock: Clock) -> None:
            moe_peers.use_loop(promoe, loop)
            for layer in promoe.modules():
                if isinstance(layer, StackedExperts):
                    layer.backend = backend
            step(clock)

        return work

    systems = {"dense": train_step(dense, adams["dense"], images, device, precision)}
    systems |= {f"promoe {name}": variant(name, False) for name in backends(device)}
    for name, model in (("dense", dense), ("promoe", promoe)):
        systems[f"{name} compiled"] = train_step(compile_model(twin(model)), adams[name], images, device, precision)
    if official:
        theirs, rates = official_twin(official.resolve(), promoe), promoe.config.optimizer
        batch = images_of(promoe, images, device)
        systems["official code"] = official_step(theirs, batch, precision, rates.lr, rates.ema_decay)
    return systems | {"promoe paper loop": variant("loop", True)}


def layer_systems(
    size: str,
    images: int,
    precision: str,
    routing: str,
    device: torch.device,
    overrides: Sequence[str] = (),
    backend: str = "inductor",
) -> dict[str, Work]:
    """Forward and backward of one layer; `overrides` of its recipe, `backend` of torch.compile."""
    config = load_config(f"imagenet256_promoe_{size}", overrides)
    layer: Any = MoELayer(config).to(device)
    draw_weights(layer)
    if routing != "learned":
        moe_peers.force_routing(layer, routing)
    x = torch.randn(images, config.model.tokens, config.model.width, device=device, requires_grad=True)
    split = split_of(images, device)

    def ours(layer: Any, backend: str) -> Work:
        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            layer.routed.experts.backend = backend
            y, (terms, offsets_E, _) = layer(x, split)
            losses = aux_losses_of(layer.router, [terms], tokens_per_expert(offsets_E)[None])
            return y, losses["routing_contrastive"].sum()

        return layer_step(layer, step, x, precision)

    def loop(x: Tensor) -> tuple[Tensor, Tensor]:
        y, (losses, _, _) = moe_peers.loop_layer(layer, x, split)
        return y, losses["routing_contrastive"]

    with autocast(device, precision):
        floor = moe_peers.gemms_alone(layer, x, split)
    systems = {f"promoe {name}": ours(layer, name) for name in backends(device)}
    if routing == "learned":
        systems["promoe compiled"] = ours(compile_whole(copy.deepcopy(layer), backend), "grouped_mm")
    systems |= {"paper loop": layer_step(layer, loop, x, precision), "gemms alone": floor}
    if routing == "learned" and importlib.util.find_spec("deepspeed"):
        hidden, experts = flops.expert_hidden(config), config.moe.num_experts  # type: ignore[union-attr]
        step, module = moe_peers.deepspeed_layer(config.model.width, hidden, experts, device)
        systems["deepspeed"] = layer_step(module, step, x, precision)
    return systems


def sampling_systems(size: str, images: int, device: torch.device) -> dict[str, Work]:
    """A few Euler steps with guidance 1.5, both halves in one forward."""
    from promoe_ds.sampling import generate  # needs pillow, the rest does not

    def sampling(name: str) -> Work:
        model = make_model(f"{name}_{size}", device).eval()
        precision = "bf16" if device.type == "cuda" else "fp32"
        options = generate.SamplingOptions(1.5, TIMED_STEPS, batch=images, precision=precision)

        def work(clock: Clock) -> None:
            clock.mark()
            indices = np.arange(images)
            latents = generate.draw_batches(model, model.config, indices % 1000, indices, options, device)
            list(generate.pixel_batches(latents))
            clock.mark()

        return work

    return {name: sampling(name) for name in ("dense", "promoe")}


def points(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name of each point and what measures it, section by section."""
    ends = {args.sizes[0], args.sizes[-1]}
    shapes = [(size, precision, micro) for precision in args.precision for size in args.sizes for micro in args.micro
              if micro == args.micro[0] or size in ends]  # fmt: skip

    def timed(systems: Callable[..., dict[str, Work]], *of: Any) -> Callable[[], dict[str, Any]]:
        def chosen() -> dict[str, Work]:
            return {name: work for name, work in systems(*of, args.device).items() if args.systems.search(name)}

        return lambda: interleaved(chosen(), args.device, args.rounds)

    for section in args.section:
        if section == "step":
            for size, precision, micro in shapes:
                work = timed(step_systems, size, micro, precision, args.official)
                yield f"step {size} {precision} micro {micro}", work
        elif section == "layer":
            for routing in args.routing:
                for size, precision, micro in shapes:
                    name = f"layer {size} {precision} micro {micro} {routing}"
                    yield name, timed(layer_systems, size, micro, precision, routing)
        else:
            batch = 64 if args.device.type == "cuda" else 2
            for size in sorted(ends, key=args.sizes.index):
                yield f"sampling {size} batch {batch}", timed(sampling_systems, size, batch)


def measure(args: argparse.Namespace) -> None:
    """Every point that has no result yet, until the time is over."""
    end, done = time.monotonic() + 60 * args.minutes, load_points(args.out)
    for name, work in points(args):
        if name in done:
            continue
        if time.monotonic() > end:
            return print("no time left; run again to go on", flush=True)
        start = time.monotonic()
        torch.compiler.reset()  # else graphs of one size count towards the limit of the next
        save_point(args.out, name, {"facts": facts() | {"rounds": str(args.rounds)}, "systems": work()})
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def over(systems: dict[str, Any], slow: str, fast: str) -> str:
    """Time of one system over that of another, round by round: both saw the same machine."""
    pair = [systems.get(name, {}).get("rounds") for name in (slow, fast)]
    return spread([sum(a) / sum(b) for a, b in zip(*pair, strict=True)], ".2f") if all(pair) else ""


def parts(found: dict[str, Any]) -> str:
    return " / ".join(f"{1e3 * median(part):.3g}" for part in zip(*found["rounds"], strict=True))


def step_row(point: str, name: str, systems: dict[str, Any], peak: float | None) -> list[str]:
    (size, *_, micro), found = point.split(), systems[name]
    config = load_config(f"imagenet256_{'dense' if name.startswith('dense') else 'promoe'}_{size}")
    rate = [int(micro) / sum(r) for r in found["rounds"]]
    mfu = f"{median(rate) * flops.train_flops(config, DROP) / peak:.1%}" if peak else ""
    peers = [over(systems, peer, name) for peer in ("dense", "promoe paper loop", "official code")]
    return [spread(rate), parts(found), mfu, *peers]


def layer_row(point: str, name: str, systems: dict[str, Any], peak: float | None) -> list[str]:
    time = spread([1e3 * sum(r) for r in systems[name]["rounds"]])
    loop, floor = over(systems, "paper loop", name), over(systems, name, "gemms alone")
    return [time, parts(systems[name]), loop, floor]


def sampling_row(point: str, name: str, systems: dict[str, Any], peak: float | None) -> list[str]:
    images = int(point.split()[-1]) * TIMED_STEPS / SAMPLER_STEPS
    return [spread([images / sum(r) for r in systems[name]["rounds"]])]


SECTIONS = {
    "step": ("Training step", step_row, ["images/s", "forward / backward / optimizer, ms", "MFU",
             "speed over dense", "speed over the paper's loop", "speed over the official code"]),
    "layer": ("MoE layer, forward and backward", layer_row, ["ms", "forward / backward, ms",
              "speed over the paper's loop", "time over its GEMMs alone"]),
    "sampling": ("Sampling: 250 Euler steps, guidance 1.5", sampling_row, ["images/s"]),
}  # fmt: skip


def tables(found: dict[str, dict[str, Any]], peak: float | None) -> Iterator[str]:
    for section, (title, row, columns) in SECTIONS.items():
        rows = []
        for point in (name for name in found if name.startswith(section)):
            systems, point = found[point]["systems"], point.removeprefix(f"{section} ")
            for name in systems:
                failed = systems[name].get("failed")
                rows.append([point, name, *([failed] if failed else row(point, name, systems, peak))])
        if rows:
            yield f"## {title}\n\n{table(['point', 'system', *columns], rows)}"


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def parse_args(words: list[str]) -> argparse.Namespace:
    """Options, with the defaults of this machine. Raises `ConfigError`."""
    gpu = torch.cuda.is_available()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes, routings = ("s", "b", "l", "xl"), ("learned", "uniform", "skewed")
    for name, known, default in (("section", ("step", "layer", "sampling"), None),
                                 ("sizes", sizes, sizes if gpu else ["s"]), ("routing", routings, None),
                                 ("precision", ("fp32", "bf16"), ["bf16" if gpu else "fp32"])):  # fmt: skip
        help = f"of {','.join(known)}; default {','.join(default or known)}"
        parser.add_argument(f"--{name}", type=words_of(*known), default=list(default or known), help=help)
    micro = [64, 8, 32, 128] if gpu else [8]
    parser.add_argument("--micro", type=integers, default=micro, help="images; all but the first at the end sizes only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no point after them")
    parser.add_argument("--systems", type=pattern, default=pattern(""), help="those whose name this matches")
    parser.add_argument("--official", type=Path, metavar="DIR", help="a clone of ali-vilab/ProMoE")
    parser.add_argument("--out", type=Path, help="folder of the figures; default runs/throughput_cpu or _gpu")
    parser.add_argument("--page", type=Path, help="the table, also printed; default page.md in that folder")
    args = parser.parse_args(words)
    check_positive(args, "rounds")
    if args.official and not (args.official / "models/models_ProMoE_TC.py").is_file():
        reject("--official", args.official, "holds no models/models_ProMoE_TC.py", "name a clone of ali-vilab/ProMoE")
    args.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    args.out = args.out or Path("runs/throughput_gpu" if gpu else "runs/throughput_cpu")
    args.page = args.page or args.out / "page.md"
    if args.out.exists() and not args.out.is_dir():
        reject("--out", args.out, "is not a folder", "choose another")
    if args.page.is_dir() or (args.page.parent != args.out and not args.page.parent.is_dir()):
        reject("--page", args.page, "is a folder, or lies in none", "name a file in a folder that is there")
    return args


def run(words: list[str]) -> None:
    args = parse_args(words)
    torch.manual_seed(0)
    measure(args)
    found = load_points(args.out)
    if not found:
        reject("--out", args.out, "holds no figures", "allow more --minutes")
    peak = flops.device_peak(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
    measured = [point["facts"] for point in found.values()]
    text = page("Throughput", "benchmarks/throughput.py", words, *tables(found, peak), measured=measured)
    write_text(args.page, text)
    print(text)


if __name__ == "__main__":
    _, console = launcher(run)
    console()
