#!/usr/bin/env python
"""Images per second of every reader of images, on the same pictures; and what an index of ImageNet takes.

    python benchmarks/image_sources.py --data tinyimagenet50_jpeg.npz [--part pictures|index] [--page FILE]

Labels and pixels of each source are compared with those of the folder tree, bit for bit, before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import image_layouts as layouts  # noqa: E402
from benchmarks.common import facts, page, spread, table  # noqa: E402
from promoe_ds.data.images import DecodedImages, PackedImages, decode, open_images  # noqa: E402
from promoe_ds.data.images import parquet as parquet_images  # noqa: E402
from promoe_ds.utils.files import write_text  # noqa: E402
from promoe_ds.utils.pictures import to_image  # noqa: E402

IMAGENET = 1_281_167
LARGE = (500, 375)
"""pixels of a usual picture of ImageNet"""
PER_FILE = 1000
PARTS = "pictures", "index"
Write = Callable[[Path, Sequence[layouts.Item]], Path]


def parquet(**how: object) -> Write:
    return lambda root, items: layouts.write_parquet(root, items, files=1, **how)  # type: ignore[arg-type]


SNAPPY = {"use_dictionary": True, "compression": "snappy"}
SOURCES: dict[str, Write] = {
    "folder per class": layouts.write_folders,
    "dataset.json, folder": layouts.write_numbered,
    "dataset.json, zip": layouts.write_zip,
    "tars (WebDataset)": lambda root, items: layouts.write_tars(root, items, files=4),
    "Parquet of datasets 5, groups of 1,000": parquet(row_group_size=1000),
    "Parquet, Snappy, groups of 10": parquet(row_group_size=10, **SNAPPY),
    "Parquet, Snappy, groups of 100": parquet(row_group_size=100, **SNAPPY),
    "Parquet, Snappy, groups of 1,000": parquet(row_group_size=1000, **SNAPPY),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="packed npz of JPEGs: the pictures")
    p.add_argument("--part", choices=PARTS, help="only this one")
    p.add_argument("--items", type=int, default=1000)
    p.add_argument("--reads", type=int, default=50, help="timed per source and round")
    p.add_argument("--rounds", type=int, default=3, help="of all sources in turn")
    p.add_argument("--page", type=Path, help="where the result goes; else it is printed")
    return p.parse_args(argv)


def real_items(pack: PackedImages, count: int) -> list[layouts.Item]:
    """Files spread over a pack, sorted by class."""
    chosen = np.linspace(0, len(pack) - 1, count).astype(int)
    chosen = chosen[np.argsort(pack.label_B[chosen], kind="stable")]
    return [(f"{number:05d}.jpeg", pack.read(i), int(pack.label_B[i])) for number, i in enumerate(chosen.tolist())]


def enlarged(items: Sequence[layouts.Item]) -> list[layouts.Item]:
    """The same pictures at the pixels of ImageNet's. They are blurred, so their files have a quarter of its bytes."""
    out, noise = [], np.random.default_rng(0).normal(0, 9, (*LARGE[::-1], 3))
    for name, data, label in items:
        picture = to_image(decode(data, name, 3, 512)).crop((6, 68, 6 + LARGE[0], 68 + LARGE[1]))
        pixels = (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)
        out.append((name, layouts.encoded(to_image(pixels)), label))
    return out


def write_all(folder: Path, items: Sequence[layouts.Item]) -> dict[str, Path]:
    return {name: write(folder / str(number), items) for number, (name, write) in enumerate(SOURCES.items())}


def opened(path: Path, size: int) -> DecodedImages:
    return open_images(str(path), split="train", channels=3, image_size=size)


def compare(paths: dict[str, Path], size: int, step: int = 1) -> None:
    """Raises AssertionError where labels, bytes or pixels of a source (of every `step`th item) are not the tree's."""
    tree = opened(paths["folder per class"], size)
    every = np.arange(0, len(tree), step)
    x, label = tree.get(every)
    for name, path in paths.items():
        data = opened(path, size)
        found, labels = data.get(every)
        assert labels.equal(label) and found.equal(x), name
        assert all(data.read(i) == tree.read(i) for i in every.tolist()), name


def timed(work: Callable[[Any], object], items: Sequence[Any]) -> tuple[float, float]:
    """Seconds of all items, and CPU seconds of all threads."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for item in items:
        work(item)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(paths: dict[str, Path], size: int, rounds: int, reads: int) -> str:
    """A table: every source in turn, each round with data sets opened anew, so that the first pass finds its places.

    No row group is kept: in a data set of ImageNet's size, a picture drawn at random is in none that was read before.
    """
    first, again, whole, cpu = ({name: [] for name in paths} for _ in range(4))
    with mock.patch.multiple(parquet_images, HELD=0, LEAST=0):
        for number, (name, path) in product(range(rounds), paths.items()):
            data = opened(path, size)
            order = np.random.default_rng(number).permutation(len(data))[:reads]
            for seconds in (first, again):
                seconds[name].append(timed(data.read, order.tolist())[0] / len(order))
            taken, busy = timed(data.get, np.split(order, range(50, len(order), 50)))
            whole[name].append(taken / len(order))
            cpu[name].append(busy / len(order))
    rows = [
        (name, spread([1e3 * s for s in first[name]]), spread([1e3 * s for s in again[name]]),
         spread([1 / s for s in whole[name]], ",.0f"), spread([1e3 * s for s in cpu[name]]))
        for name in paths
    ]  # fmt: skip
    columns = ("source", "ms to read one", "again", "images/s, read and decoded", "CPU ms per image")
    return table(columns, rows)


# ------------------------------------------------------------------------------------------------- an index of ImageNet

INDEX = """
import os, resource, sys, time
import numpy as np
from promoe_ds.data.images import open_images
import promoe_ds.data.images.parquet
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before, start, busy = memory(), time.perf_counter(), time.process_time()
data = open_images(sys.argv[1], split="train", channels=3, image_size=8)
seconds, busy, opened = time.perf_counter() - start, time.process_time() - busy, memory() - before
for index in np.random.default_rng(0).integers(0, len(data), 2_000).tolist():
    data.read(index)
later, pipes = memory() - before, []
private = lambda: sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if "Private_Dirty" in line) / 1e3
for worker in range(8):
    out, into = os.pipe()
    pipes.append(out)
    if os.fork() == 0:
        own = private()
        for index in np.random.default_rng(worker).integers(0, len(data), 2_000).tolist():
            data.read(index)
        os.write(into, str(private() - own).encode())
        os._exit(0)
print(len(data), seconds, busy, opened, later, sum(float(os.read(pipe, 64)) for pipe in pipes) / 8)
"""


def linked(file: Path, items: int) -> Path:
    """A folder of links to one file, as many as it takes: reading an index costs the same, and the disk is spared."""
    folder = file.parent / "many"
    folder.mkdir()
    for number in range(-(-items // PER_FILE)):
        os.link(file, folder / f"train-{number:05d}{file.suffix}")
    return folder


def many_tars(folder: Path, items: int) -> Path:
    return linked(next(layouts.write_tars(folder, few(PER_FILE), files=1).iterdir()), items)


def many_parquet(folder: Path, items: int, **how: object) -> Path:
    return linked(next(parquet(row_group_size=100, **how)(folder, few(PER_FILE)).iterdir()), items)


def many_numbered(folder: Path, items: int) -> Path:
    return layouts.write_zip(folder, few(items))


def few(count: int) -> list[layouts.Item]:
    """Files of a few bytes, with names as long as ImageNet's."""
    return [(f"n01440764_{number:08d}.JPEG", b"data", number * 50 // count) for number in range(count)]


MANY: dict[str, Callable[[Path, int], Path]] = {
    "tars of 1,000 (WebDataset)": many_tars,
    "Parquet, plain, 1,000 rows per file, groups of 100": many_parquet,
    "Parquet, Snappy, 1,000 rows per file, groups of 100": lambda folder, items: many_parquet(folder, items, **SNAPPY),
    "dataset.json, zip": many_numbered,
}
"""synthetic sources of so many items"""


def index_of(path: Path) -> tuple[int, float, float, float, float, float]:
    """Items, seconds and CPU seconds to open, MB of memory, MB after 2,000 reads at random, MB that each of 8 workers
    forked from it had to copy after 2,000 reads; in a process of its own."""
    command = [sys.executable, "-c", INDEX, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    items, *numbers = map(float, done.stdout.split())
    return int(items), *numbers  # type: ignore[return-value]


def measure_indexes(folder: Path, items: int) -> str:
    rows = []
    for number, (name, write) in enumerate(MANY.items()):
        found, seconds, busy, *megabytes = index_of(write(folder / f"many{number}", items))
        rows.append((name, f"{found:,}", f"{seconds:.1f}", f"{busy:.1f}", *(f"{mb:.0f}" for mb in megabytes)))
        shutil.rmtree(folder / f"many{number}")
    columns = ("source", "items", "seconds to open", "CPU seconds", "MB of index", "MB after 2,000 reads")
    return table((*columns, "MB that each of 8 forked workers adds in 2,000 reads"), rows)


def measure_pictures(folder: Path, args: argparse.Namespace) -> list[str]:
    pack = open_images(str(args.data), split="train", channels=3, image_size=64)
    assert isinstance(pack, PackedImages)
    small, parts = real_items(pack, args.items), []
    for title, items, size, step in (
        ("as they are", small, 64, 1),
        ("at the pixels of ImageNet's", enlarged(small), 256, 10),
    ):
        paths = write_all(folder / str(size), items)
        compare(paths, size, step)
        mean = sum(len(data) for _, data, _ in items) / len(items)
        words = f"{len(items):,} files of {mean:,.0f} bytes on average, to {size} pixels."
        parts += [f"## Pictures {title}", words, measure(paths, size, args.rounds, args.reads)]
    return parts


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    parts, before = [], facts()
    with tempfile.TemporaryDirectory() as temporary:
        if args.part != "index":
            parts += measure_pictures(Path(temporary), args)
        if args.part != "pictures":
            parts += ["## An index of ImageNet", measure_indexes(Path(temporary), IMAGENET)]
    text = page("Reading images", "benchmarks/image_sources.py", argv, *parts, measured=[before])
    if args.page:
        write_text(args.page, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
