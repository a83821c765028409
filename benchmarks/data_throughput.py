"""Images per second of the encoder, the loader and Inception, and what storing latents as float16 costs.

    python benchmarks/data_throughput.py --part loader
    python benchmarks/data_throughput.py --part encode --vae taef2 --size 128 [--device cuda]
    python benchmarks/data_throughput.py --part features --batch 8
    python benchmarks/data_throughput.py --part storage --images PACK.npz --vae taef2 --size 128

Every figure is the median of `--repeats` measurements, with the lowest and the highest. All but `storage` needs no
files: latents of the size of ImageNet's are drawn at random, and so are Inception's weights. throughput.py measures
sampling.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import page, spread, table
from promoe_ds.data import build_dataset, shards
from promoe_ds.data.batches import BatchMaker
from promoe_ds.data.caches.cache import SD_CODEC
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.images import open_images
from promoe_ds.evaluation.collect import Collector
from promoe_ds.evaluation.inception import Inception, InceptionV3
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.files import file_digest


def rate(what: str, images: int, work: Callable[[], object], repeats: int) -> list[str]:
    """A row: images per second, and the CPU time of an image, whose inverse is what an idle core would do."""
    work()
    found, spent = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(images / (time.perf_counter() - start))
    cpu = (time.process_time() - spent) / images / repeats
    return [what, spread(found, ",.1f"), f"{cpu * 1e3:.3g} ms"]


def random_shards(folder: Path, items: int, size: int = 1024) -> None:
    """Moments of ImageNet's shape, 2 x 8 x 32 x 32 in float16, in shards of `size`."""
    rng, made = np.random.default_rng(0), []
    count = items // size
    for number in range(count):
        path = folder / shards.shard_name(number, count)
        shards.write_tensors(path, {"moments": rng.standard_normal((size, 2, 8, 32, 32), np.float32).astype("f2")})
        made.append(shards.Shard(path.name, size, path.stat().st_size, file_digest(path)))
    shards.write_tensors(folder / shards.ITEMS, {"label": np.arange(items) % 1000, "names": np.zeros(1, np.uint8)})
    names = [f"{i:04d}" for i in range(1000)]
    digest = file_digest(folder / shards.ITEMS)
    index = shards.Index(names, items, [2, 8, 32, 32], "float16", 256, "", SD_CODEC, digest, made, [])
    shards.write_index(folder, index)


def loader(args: argparse.Namespace) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        random_shards(Path(folder), 8192)
        config = load_config("imagenet256_promoe_s", [f"data.path={folder}"])
        config = replace(config, train=replace(config.train, global_batch_size=args.batch))
        data = build_dataset(config)
        maker = BatchMaker(config, data)
        steps = iter(range(10**6))
        indices = iter(np.random.default_rng(1).integers(0, len(data), (10**4, args.batch)))
        whole = "loader, whole step: order, reading, posterior, flip, label drop, noise"
        return [rate(whole, args.batch, lambda: maker.step(next(steps)), args.repeats),
                rate("loader, reading alone", args.batch, lambda: data.get(next(indices)), args.repeats)]  # fmt: skip


def encode(args: argparse.Namespace) -> list[list[str]]:
    codec = open_codec(args.vae, args.device)
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device) * 2 - 1
    with torch.inference_mode():
        z = codec.encode(x)[:, : codec.channels]
        both = f"encode both flips, {codec.kind} at {args.size}"
        back = f"decode, {codec.kind} at {args.size}"
        return [rate(both, args.batch, lambda: (codec.encode(x), codec.encode(x.flip(-1))), args.repeats),
                rate(back, args.batch, lambda: codec.decode(z), args.repeats)]  # fmt: skip


def features(args: argparse.Namespace) -> list[list[str]]:
    """Random weights, 256x256 pictures, hashing and moments included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(InceptionV3().state_dict(), path)
        extractor = Inception(path, args.device, args.batch)
    images = np.random.default_rng(0).integers(0, 256, (args.batch, 256, 256, 3), np.uint8)
    return [rate("Inception's features", args.batch, lambda: Collector(extractor).add(images), args.repeats)]


def storage(args: argparse.Namespace) -> list[list[str]]:
    codec = open_codec(args.vae, args.device)
    images = open_images(args.images, split="test", channels=3, image_size=args.size)
    x, _ = images.get(np.linspace(0, len(images) - 1, args.batch).astype(int))
    with torch.inference_mode():
        z = codec.encode(x)[:, : codec.channels]
        half = z.half().float()
        exact, stored = (codec.decode(latent).clamp(-1, 1) for latent in (z, half))

    def psnr(y: torch.Tensor) -> str:
        return f"{(-10 * torch.log10((((x - y) / 2) ** 2).mean((1, 2, 3)))).mean():.3f} dB"

    return [
        [f"{codec.kind} at {args.size}, {args.batch} pictures: latents", f"mean {z.mean():.3f}, std {z.std():.3f}"],
        ["round trip", psnr(exact)],
        ["round trip through float16", psnr(stored)],
        ["largest change of a pixel", f"{(exact - stored).abs().max() * 127.5:.3f} of 255 levels"],
        ["relative error of latents", f"{(z - half).norm() / z.norm():.1e}"],
    ]


PARTS = {"loader": loader, "encode": encode, "features": features, "storage": storage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--vae", default="identity")
    parser.add_argument("--images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    columns = ["storage", "figure"] if args.part == "storage" else ["part", "images/s", "CPU time per image"]
    figures = table(columns, PARTS[args.part](args))
    print(page("Data", "benchmarks/data_throughput.py", sys.argv[1:], figures))


if __name__ == "__main__":
    main()
