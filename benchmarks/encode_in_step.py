"""How fast are training that encodes in the step, training on cached shards of the same images, and decoding alone?

Three tables, rounds of which take turns: images per second of pictures to pixels by threads and by processes; how many
small operations the main thread starts per second meanwhile, as it does when it launches a model's kernels; training
steps of a small ProMoE by both ways. A round of a system begins when its stream has run dry. CPU time, of all processes
together and of whole rounds, hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import integers, page, spread, table, words_of
from promoe_ds.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, MoEConfig, TrainConfig
from promoe_ds.data import build_dataset
from promoe_ds.data.batches import BatchMaker, BatchStream
from promoe_ds.data.codecs import Codec, open_codec
from promoe_ds.data.coded_images import CodedImages
from promoe_ds.data.encode import EncodedImages, EncodeJob, Encoder, run_encoding
from promoe_ds.data.images import DecodedImages, open_images
from promoe_ds.data.workers import Workers
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes import load as load  # makes the routers known
from promoe_ds.utils.files import write_text
from promoe_ds.utils.ranks import ALONE

Round = Callable[[], tuple[float, int]]
"""-> images (or operations) per second, and how many were made in all"""


def write_subset(images: DecodedImages, count: int, root: Path) -> Path:
    """`count` files, spread over the data set, as they are, in a tree."""
    for index in np.linspace(0, len(images) - 1, count).astype(int).tolist():
        folder = root / images.classes[images.label_B[index]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:08d}.jpg").write_bytes(images.read(index))
    return root


def config_of(args: argparse.Namespace, codec: Codec, classes: int, **data: object) -> Config:
    return Config(
        model=ModelConfig(depth=args.depth, width=args.width, heads=6, image_size=args.size // codec.factor,
                          channels=codec.channels, num_classes=classes),
        moe=MoEConfig(),
        data=DataConfig(hflip=True, **data),  # type: ignore[arg-type]
        diffusion=DiffusionConfig(),
        train=TrainConfig(global_batch_size=args.batch, precision="fp32"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ decoding


@contextmanager
def decoding(config: Config, threads: int, processes: int) -> Iterator[Iterator[int]]:
    """Micro-batch after micro-batch with all that is random in it, forever; yields how many images each has."""
    data = build_dataset(config)
    assert isinstance(data, CodedImages)
    maker = BatchMaker(config, data)
    if processes:
        workers = Workers(maker.arrays, 0, maker.nbytes, processes)
        yield (len(made["rows"]) for made in workers)
        workers.end()
    else:
        data.images.pool = ThreadPoolExecutor(threads)
        yield (len(maker.micro_batch(number).rows) for number in itertools.count())
        data.images.pool.shutdown()


def decode_rate(config: Config, threads: int, processes: int, batches: int) -> tuple[float, int]:
    with decoding(config, threads, processes) as made:
        before = sum(itertools.islice(made, 2 * max(1, processes)))  # what was prepared while nobody measured
        start = time.perf_counter()
        count = sum(itertools.islice(made, batches))
        return count / (time.perf_counter() - start), before + count


def launch_rate(config: Config, threads: int, processes: int, seconds: float = 1.0) -> tuple[float, int]:
    """Small operations that the main thread starts per second, while another one takes batches as fast as they come."""
    stop, x = threading.Event(), torch.zeros(8)

    def consume(made: Iterator[int]) -> None:
        while not stop.is_set():
            next(made)

    def launches() -> tuple[float, int]:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(100):
                x.add_(1)
            count += 100
        return count / (time.perf_counter() - start), count

    if not threads and not processes:
        return launches()
    with decoding(config, threads, processes) as made:
        consumer = threading.Thread(target=consume, args=(made,), daemon=True)
        consumer.start()
        time.sleep(0.2)
        rate = launches()
        stop.set()
        consumer.join()
    return rate


# ------------------------------------------------------------------------------------------------------------ training


def train_rate(config: Config, device: torch.device, steps: int) -> Round:
    """Steps of one rank, without DeepSpeed: forward, backward, AdamW."""
    model, data = build(config), build_dataset(config)
    materialize(model, 0, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    objective = make_objective(config.diffusion, device)

    def step(stream: BatchStream) -> None:
        for batch in next(stream):
            z, eps, gauss = (x.to(device) for x in (batch.x_BCHW, batch.noise_BCHW, batch.gauss_B))
            forward = lambda x, t, b=batch: model(x, t, b.label_B, b.rows)  # noqa: E731
            _, losses = objective.loss(forward, z, eps, gauss)
            losses["diffusion"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def work() -> tuple[float, int]:
        with BatchStream(config, data, ALONE) as stream:
            for _ in range(config.data.prefetch + 1):
                step(stream)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                step(stream)
            synchronize(device)
            batch = config.train.global_batch_size
            return steps * batch / (time.perf_counter() - start), (steps + config.data.prefetch + 1) * batch

    return work


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_rate(config: Config, steps: int) -> Round:
    """Batches with all that is random in them, but not encoded: what the model waits for at most."""
    data = build_dataset(config)

    def work() -> tuple[float, int]:
        with BatchStream(config, data, ALONE) as stream:
            stream._encoder = None
            for _ in range(config.data.prefetch + 1):
                next(stream)
            start = time.perf_counter()
            for _ in range(steps):
                next(stream)
            batch = config.train.global_batch_size
            return steps * batch / (time.perf_counter() - start), (steps + config.data.prefetch + 1) * batch

    return work


def cpu_seconds() -> float:
    """Of this process, and of those it started that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def rounds_of(systems: dict[str, Round], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By system, of each round: per second, and CPU milliseconds of each."""
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for number in range(rounds):
        for name, work in systems.items():
            before = cpu_seconds()
            rate, count = work()
            out[name].append((rate, 1e3 * (cpu_seconds() - before) / count))
            print(f"round {number + 1}: {name}: {out[name][-1]}", file=sys.stderr, flush=True)
    return out


def report(title: str, unit: str, measured: dict[str, list[tuple[float, float]]]) -> str:
    rows = []
    for name, values in measured.items():
        rates, cpu = zip(*values, strict=True)
        rows.append((name, spread(rates, ",.3g" if max(rates) < 1000 else ",.0f"), spread(cpu)))
    return f"## {title}\n\n{table(['', f'{unit}/s', f'CPU ms per {unit[:-1]}'], rows)}"


def sections(args: argparse.Namespace, root: Path) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_images(args.images, split="train", channels=3, image_size=args.size)
    tree = write_subset(source, args.items, root / "tree")
    images, codec = open_images(str(tree), split="", channels=3, image_size=args.size), open_codec(args.vae, device)
    run_encoding(Encoder(EncodedImages(images, codec, 16, device), EncodeJob(root / "shards"), "", {}), ALONE)
    coded = config_of(args, codec, images.num_classes, name="images", path=str(tree), vae=args.vae)
    cached = config_of(args, codec, images.num_classes, name="latents", path=str(root / "shards"))
    ways = [(n, 0) for n in args.workers] + [(0, n) for n in args.workers]
    words = {way: f"{way[0]} thread(s)" if way[0] else f"{way[1]} process(es)" for way in ways}
    rate = {words[way]: partial(decode_rate, coded, *way, args.decode_batches) for way in ways}
    launched = {"nothing": partial(launch_rate, coded, 0, 0)}
    launched |= {words[way]: partial(launch_rate, coded, *way) for way in ways}
    by = {n: replace(coded, data=replace(coded.data, workers=n)) for n in (0, *args.workers)}
    steps = {"training on cached shards": train_rate(cached, device, args.steps)}
    for n, config in by.items():
        who = f"{n} process(es)" if n else "threads"
        steps[f"training that encodes, decoded by {who}"] = train_rate(config, device, args.steps)
        steps[f"batches alone, decoded by {who}, not encoded"] = stream_rate(config, args.decode_batches)
    tables = {
        "decode": ("Decoding and cropping", "images", rate),
        "launch": ("Beside it, on the main thread", "operations", launched),
        "train": ("Training", "images", steps),
    }
    return [report(title, unit, rounds_of(tables[part][2], args.rounds)) for part in args.parts
            for title, unit, _ in [tables[part]]]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", required=True, metavar="PATH", help="a tree with a folder per class, or a packed npz")
    p.add_argument("--vae", required=True, metavar="DIR", help="a codec")
    p.add_argument("--size", type=int, default=256, help="side of the pictures in pixels (default 256)")
    p.add_argument("--items", type=int, default=256, help="pictures that are used (default 256)")
    p.add_argument("--batch", type=int, default=16, help="images per step (default 16)")
    p.add_argument("--depth", type=int, default=4, help="blocks of the model (default 4)")
    p.add_argument("--width", type=int, default=192, help="of the model (default 192)")
    p.add_argument("--steps", type=int, default=5, help="training steps per round (default 5)")
    p.add_argument("--decode-batches", type=int, default=20, help="batches per round of decoding (default 20)")
    p.add_argument("--rounds", type=int, default=5, help="(default 5)")
    p.add_argument("--workers", type=integers, default=[1, 2], metavar="N[,N...]", help="(default 1,2)")
    parts = ("decode", "launch", "train")
    p.add_argument("--parts", type=words_of(*parts), default=parts, metavar="P[,P...]", help=f"of {', '.join(parts)}")
    p.add_argument("--out", type=Path, metavar="FILE", help="result page (default: print it)")
    words = sys.argv[1:] if argv is None else argv
    args, root = p.parse_args(words), Path(tempfile.mkdtemp())
    try:
        tables = sections(args, root)
    finally:
        shutil.rmtree(root)
    text = page("Encoding in the step, and cached latents", "benchmarks/encode_in_step.py", words, *tables)
    print(text)
    if args.out:
        write_text(args.out, text)


if __name__ == "__main__":
    main()
