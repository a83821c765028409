#!/usr/bin/env python
"""What cannot be run here: step time of a recipe on 8 to 512 GPUs at each expert-parallel degree, from bytes and FLOPs.

examples:
  python benchmarks/cost_model.py                                       ProMoE-XL on H100s, weak and strong scaling
  python benchmarks/cost_model.py --hardware pcie --world 8,16 --images 16 --ep 1,2,4
  python benchmarks/cost_model.py --validate runs/scaling/digits-strong-uniform --validate runs/scaling/...
  python benchmarks/cost_model.py --out benchmarks/results/cost_model.md --validate ...

A step of a rank is compute + exposed all-to-all + exposed gradient reduction + parameter gathering + optimizer:

  compute       FLOPs / (peak * efficiency); under expert parallelism routed FLOPs times the load of the busiest rank
  all-to-all    4 exchanges per MoE layer and micro-batch, the slower of NVLink and network, each with its latency,
                hidden behind `overlap` of the shared and unconditional experts' work that runs beside it, plus one
                exchange of counts and one host synchronisation, not hidden
  gradients     each reduced to the rank that owns it (the shipped ds_configs at ZeRO 1 and 2), a latency for each
                reduction, hidden behind `overlap` of the backward pass, but while rows travel: the links are taken
                then. A reduction to one rank takes its bytes over the bandwidth, an all-reduce over n ranks 2 (n-1)/n
                of that: nothing is saved on two ranks
  parameters    all-gather after the step, not hidden
  optimizer     32 bytes per element of this rank's share, from memory

Bytes are those of promoe_ds/costs/comm_volume.py, which a scaling study compares with counted ones. --validate fits a
time model to half of the topologies (world, ep) of a study and tests it on the others, which the fit has not seen.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import integers, page, table  # noqa: E402
from benchmarks.scaling_study import Measured, read_points  # noqa: E402
from promoe_ds.config.batching import batch_plan  # noqa: E402
from promoe_ds.config.errors import reject  # noqa: E402
from promoe_ds.config.schema import Config  # noqa: E402
from promoe_ds.costs import comm_volume, flops  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.utils.command_line import Parser, guarded  # noqa: E402

OPTIMIZER_BYTES = 32  # read and written per element: weight, two moments, EMA in fp32


@dataclass(frozen=True)
class Hardware:
    name: str
    gpus_per_node: int
    peak_tflops: float
    efficiency: float
    intra_gbs: float
    inter_gbs: float
    memory_gbs: float
    memory_gib: float
    latency_us: float
    sync_us: float
    overlap: float

    def bandwidth(self, members: int, stride: int) -> float:
        """Bytes/s of a GPU in a ring over `members` ranks that are `stride` apart, all such rings at once.

        A ring that leaves a node does so once for each of its members there, each with a network card of its own.
        """
        if members * stride <= self.gpus_per_node:
            return self.intra_gbs * 1e9
        here = max(1.0, self.gpus_per_node / stride)
        return min(self.intra_gbs, here * self.inter_gbs) * 1e9

    def far(self, ep: int, world: int) -> float:
        """Share of a rank's peers in its group of `ep` consecutive ranks on other nodes, for the worst placed rank."""
        node = lambda rank: rank // self.gpus_per_node  # noqa: E731
        ranks = range(min(world, math.lcm(ep, self.gpus_per_node)))
        groups = {r: range(r - r % ep, r - r % ep + ep) for r in ranks}
        return max(sum(node(r) != node(peer) for peer in groups[r]) for r in ranks) / max(1, ep - 1)


class Prediction(NamedTuple):
    """Seconds of a step by part, and GiB per GPU."""

    compute: float
    all_to_all: float
    gradients: float
    parameters: float
    optimizer: float
    memory_gib: float
    batch: int

    @property
    def seconds(self) -> float:
        return sum(self[:5])

    @property
    def rate(self) -> float:
        """Images/s of all GPUs."""
        return self.batch / self.seconds


def compute_seconds(config: Config, hw: Hardware, images: int, ep: int, busiest: float) -> float:
    """Forward and backward of `images` images on one GPU."""
    work = flops.train_flops(config, config.diffusion.label_drop)
    assert config.moe is not None
    tokens = config.model.tokens * (1 - config.diffusion.label_drop if config.moe.conditional else 1)
    expert = 2 * config.model.width * flops.expert_hidden(config) * flops.experts_per_token(config)
    routed = 6 * len(config.moe_layers()) * tokens * expert
    extra = (busiest - 1) * routed if ep > 1 else 0.0
    return images * (work + extra) / (hw.peak_tflops * 1e12 * hw.efficiency)


class Exchanges(NamedTuple):
    """All exchanges of rows of a step."""

    exposed: float
    """seconds that nothing hides"""
    backward: float
    """seconds that rows travel beside work of the backward pass"""


def exchanges(config: Config, hw: Hardware, world: int, ep: int, accumulation: int, busiest: float) -> Exchanges:
    """Four exchanges per layer and micro-batch, with the work that `moe/layer.py` runs beside each.

    Shared experts run beside the dispatch, unconditional ones beside the combine. Their gradients, twice as many FLOPs,
    run beside the ways back.
    """
    moe = config.moe
    assert moe is not None
    if ep == 1:
        return Exchanges(0.0, 0.0)
    times = accumulation * len(config.moe_layers())
    sent = comm_volume.all_to_all_expected(config, ep) / world / times / 4 * busiest  # bytes per rank and exchange
    far = hw.far(ep, world)
    travel = max((1 - far) * sent / (hw.intra_gbs * 1e9), far * sent / (hw.inter_gbs * 1e9)) + hw.latency_us * 1e-6
    tokens = config.model.tokens * config.train.global_batch_size / world / accumulation
    expert = 2 * 2 * config.model.width * flops.expert_hidden(config) * tokens
    shared = moe.num_shared * expert
    null = (moe.num_unconditional if moe.conditional else 0) * config.diffusion.label_drop * expert
    speed = hw.peak_tflops * 1e12 * hw.efficiency
    hidden = [min(travel, hw.overlap * work / speed) for work in (shared, null, 2 * null, 2 * shared)]
    fixed = (hw.latency_us + hw.sync_us) * 1e-6
    return Exchanges(times * (4 * travel - sum(hidden) + fixed), times * sum(hidden[2:]))


def _rings(config: Config, hw: Hardware, world: int, ep: int) -> list[tuple[int, float]]:
    """(ranks, seconds that all their bytes take over one link), for dense parameters and for replicas of experts."""
    dense, routed = comm_volume.trained(config)
    size, replicas = comm_volume.weight_bytes(config), world // ep
    rings = [(world, dense * size / hw.bandwidth(world, 1))]
    rings.append((replicas, routed / ep * size / hw.bandwidth(replicas, ep)))
    return [(ranks, seconds) for ranks, seconds in rings if ranks > 1]


def reduce_seconds(config: Config, hw: Hardware, world: int, ep: int, multi_rank: bool = False) -> float:
    """Reduction of every gradient to its owner, or with `multi_rank` the ring all-reduce, with their latencies."""
    rings, latency = _rings(config, hw, world, ep), hw.latency_us * 1e-6
    seconds = sum(seconds * (2 * (ranks - 1) / ranks if multi_rank else 1) for ranks, seconds in rings)
    return seconds + latency * comm_volume.reductions(config, world, ep, multi_rank)


def gather_seconds(config: Config, hw: Hardware, world: int, ep: int) -> float:
    """All-gather of the updated parameters, dense ones over all ranks, experts over their replicas."""
    return sum(seconds * (ranks - 1) / ranks for ranks, seconds in _rings(config, hw, world, ep))


def predict(config: Config, hw: Hardware, world: int, ep: int, busiest: float = 1.0) -> Prediction:
    """A step at ZeRO 1 with reduction to the owner.

    Args:
        config: its global batch is that of all `world` GPUs.
        busiest: rows of the busiest rank of an expert-parallel group over the mean.
    """
    batch = config.train.global_batch_size
    _, accumulation = batch_plan(config, world)
    compute = compute_seconds(config, hw, batch // world, ep, busiest)
    reduce = reduce_seconds(config, hw, world, ep)
    rows = exchanges(config, hw, world, ep, accumulation, busiest)
    hidden = hw.overlap * (compute * 2 / 3 - rows.backward)
    gradients = max(0.0, reduce - hidden) + hw.latency_us * 1e-6
    optimizer = OPTIMIZER_BYTES * sum(comm_volume.trained(config)) / world / (hw.memory_gbs * 1e9)
    memory = sum(flops.memory_per_gpu(config, world, ep, 1, False, 100_000_000).values()) / 2**30
    gather = gather_seconds(config, hw, world, ep)
    return Prediction(compute, rows.exposed, gradients, gather, optimizer, memory, batch)


def crossover_images(config: Config) -> float:
    """Images per GPU and step below which the all-to-all of expert parallelism moves fewer bytes than it saves.

    4 K T D b_row L (1 - 1/ep) < b_weight P_r (1 - 1/ep), with T tokens of conditional images; independent of ep, W.
    """
    ep = 2
    per_image = comm_volume.all_to_all_expected(config, ep) / config.train.global_batch_size
    return comm_volume.weight_bytes(config) * comm_volume.trained(config)[1] * (1 - 1 / ep) / per_image


def ways_table(args: argparse.Namespace, hw: Hardware, config: Config) -> str:
    """The whole reduction, nothing hidden, to the owner and as an all-reduce."""
    assert config.moe is not None
    rows, experts = [], config.moe.num_experts
    for ep in (1, 2, 4):
        for world in (w for w in args.world if w % ep == 0 and experts % ep == 0):
            cells = []
            for multi_rank in (False, True):
                seconds = reduce_seconds(config, hw, world, ep, multi_rank)
                cells += [comm_volume.reductions(config, world, ep, multi_rank), f"{1000 * seconds:.1f}"]
            ratio = reduce_seconds(config, hw, world, ep) / reduce_seconds(config, hw, world, ep, True)
            rows.append([ep, world, *cells, f"{ratio:.2f}"])
    return table(["ep", "GPUs", "reductions", "ms", "all-reduces", "ms", "time over all-reduce's"], rows)


def rates_table(args: argparse.Namespace, hw: Hardware, batches: dict[int, int]) -> str:
    """Images/s at each world and ep, the best in bold, and the best ep > 1 compared with ep 1."""
    rows, slower = [], 0
    for world, batch in batches.items():
        if batch % world:
            continue
        config = load_config(args.recipe, [*args.overrides, f"train.global_batch_size={batch}"])
        assert config.moe is not None
        found = {ep: predict(config, hw, world, ep, busiest=args.busiest) for ep in args.ep
                 if world % ep == 0 and config.moe.num_experts % ep == 0}  # fmt: skip
        fits = {ep: p for ep, p in found.items() if p.memory_gib <= hw.memory_gib}
        if not fits:
            continue
        best = max(fits, key=lambda ep: fits[ep].rate)
        cells = {ep: f"{p.rate:,.0f}" if ep in fits else f"needs {p.memory_gib:.0f} GiB" for ep, p in found.items()}
        cells |= {ep: f"**{cells[ep]}**" for ep in cells if ep == best}
        row = [world, batch // world, *(cells.get(ep, "-") for ep in args.ep)]
        if 1 in fits and len(fits) > 1:
            other = max((ep for ep in fits if ep > 1), key=lambda ep: fits[ep].rate)
            gain = fits[other].rate / fits[1].rate
            slower += gain < 1
            row += [f"ep {other}: {'slower' if gain < 1 else 'faster'}, {gain:.2f}", parts(fits[1]), parts(fits[other])]
        rows.append(row)
    ends = ["best ep > 1 over ep 1", "parts at ep 1", "and there"]
    text = table(["GPUs", "images per GPU", *(f"ep {ep}" for ep in args.ep), *ends], rows)
    if skipped := [str(world) for world, batch in batches.items() if batch % world]:
        text += f"\n\nNot divisible by the batch: {', '.join(skipped)} GPUs."
    return f"{text}\n\nExpert parallelism is slower than ep 1 in {slower} of {len(rows)} rows."


def parts(p: Prediction) -> str:
    return " + ".join(f"{1000 * seconds:.1f}" for seconds in p[:5]) + " ms"


def features(point: Measured, cores: int) -> list[float]:
    """[4] of a measured point on one machine: FLOPs per core, bytes, collectives times ranks, ranks."""
    config, world = point.config, point.world
    work = flops.train_flops(config, config.diffusion.label_drop) * point.batch / min(world, cores)
    sent = sum(point.sent(kind) for kind in ("all_to_all", "counts", "router_sums", "gradients", "parameters"))
    layers = len(config.moe_layers())
    calls = layers * 5 * (point.ep > 1) + 4 * (world > 1) + 2 * (world > 1 and point.routing == "learned")
    return [work / 1e9, sent / 1e6, calls * world, world]


def validate(folders: list[Path], cores: int) -> str:
    """Fit on every other topology (world, ep), test on the rest.

    Not on every other point: points that differ in the ZeRO stage or the study alone have nearly the same features.
    """
    from scipy.optimize import nnls

    points = [p for folder in folders for p in read_points(folder, "--validate")]
    topologies = sorted({(p.world, p.ep) for p in points})
    if len(topologies) < 2:
        reject("--validate", ", ".join(map(str, folders)), "has one topology", "add points of other worlds or ep")
    x, y = np.array([features(p, cores) for p in points]), np.array([p.batch / p.rate for p in points])
    test = np.array([topologies.index((p.world, p.ep)) % 2 == 1 for p in points])
    weight, _ = nnls(x[~test] / y[~test, None], np.ones(int((~test).sum())))  # relative errors
    predicted = x @ weight
    error = np.abs(predicted / y - 1)
    terms = ("ms/GFLOP per core", "ms/MB", "ms per collective and rank", "ms per rank")
    law = " + ".join(f"{1000 * w:.2f} {term}" for w, term in zip(weight, terms, strict=True))
    rows = [[p.world, p.ep, p.stage, p.routing, f"{1000 * y[i]:.1f}", f"{1000 * predicted[i]:.1f}",
             f"{error[i]:.0%}", "test" if test[i] else "fit"] for i, p in enumerate(points)]  # fmt: skip
    columns = ["world", "ep", "ZeRO", "routing", "measured ms", "predicted ms", "error", "used for"]
    return (
        f"Time: t = {law}, fitted on {(~test).sum()} points (median error {median(error[~test]):.0%}), tested on the "
        f"{test.sum()} of other topologies: median error {median(error[test]):.0%}, worst {error[test].max():.0%}.\n\n"
        + table(columns, rows)
    )


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="imagenet256_promoe_xl")
    parser.add_argument("--hardware", default="h100", help="a section of benchmarks/cost_model.yaml")
    parser.add_argument("--world", type=integers, default=[8, 16, 24, 48, 64, 96, 128, 192, 256, 512], metavar="8,16")
    parser.add_argument("--ep", type=integers, default=[1, 2, 3, 4, 6, 12], metavar="1,2,4")
    parser.add_argument("--images", type=int, default=32, help="weak scaling: images per GPU and step (32)")
    parser.add_argument("--batch", type=integers, default=[256, 1536], metavar="B", help="strong: global batches")
    parser.add_argument("--busiest", type=float, default=1.1, help="rows of the busiest rank over the mean (1.1)")
    parser.add_argument("--validate", type=Path, action="append", default=[], metavar="STUDY")
    parser.add_argument("--cores", type=int, default=2, help="of the machine the study ran on (2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(words)


def report(args: argparse.Namespace, words: list[str]) -> str:
    """The whole page. Raises ConfigError for unknown hardware or a dense recipe."""
    known = yaml.safe_load((ROOT / "benchmarks/cost_model.yaml").read_text(encoding="utf-8"))
    if args.hardware not in known:
        reject("--hardware", args.hardware, "is not known", f"choose one of {', '.join(known)}")
    hw, config = Hardware(**known[args.hardware]), load_config(args.recipe, args.overrides)
    if config.moe is None:
        reject("--recipe", args.recipe, "is dense: there is nothing to shard", "choose a MoE recipe")
    crossover = crossover_images(config)
    text = f"""\
**Modelled, not measured.** Images/s of all GPUs; parts are compute + all-to-all + gradients + parameters + optimizer.
The busiest rank has {args.busiest:g} times the mean rows. Assumptions: the program's docstring and
`benchmarks/cost_model.yaml`.

Crossover: below {crossover:.0f} images per GPU and step, expert parallelism moves fewer bytes than it saves in
gradients; below {2 * crossover:.0f}, fewer than it saves in gradients and in the parameters that ZeRO
gathers. That is bytes per GPU, not time: gradients can hide behind the backward pass, the all-to-all cannot. Between
nodes nothing is saved while ep stays within a node, because each node still holds every expert."""
    weak = rates_table(args, hw, {world: world * args.images for world in args.world})
    sections = [f"## Weak scaling, {args.images} images per GPU\n\n{weak}"]
    for batch in args.batch:
        strong = rates_table(args, hw, {world: batch for world in args.world})
        sections.append(f"## Strong scaling, global batch {batch}\n\n{strong}")
    ways = "Nothing hidden, a latency for each collective, buckets of 50 million elements."
    sections.append(f"## Reduction to the owner against all-reduce\n\n{ways}\n\n{ways_table(args, hw, config)}")
    if args.validate:
        scope = "This tests a law of time for the measured machine. No time predicted above was ever measured."
        sections.append(f"## Validation on measured points\n\n{scope}\n\n{validate(args.validate, args.cores)}")
    title = f"Cost model: {config.name} on {hw.name}"
    return page(title, "benchmarks/cost_model.py", words, text, *sections)


def run(words: list[str]) -> None:
    args = parse_args(words)
    text = report(args, words)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
