"""Images a second of the encoder, the loader and the sampler, and the bytes and errors of storing latents.

    python benchmarks/data_throughput.py --part loader
    python benchmarks/data_throughput.py --part encode --vae taef2 --size 128 [--device cuda]
    python benchmarks/data_throughput.py --part sample --config imagenet256_promoe_s --steps 2
    python benchmarks/data_throughput.py --part storage --images PACK.npz --vae taef2 --size 128

Every figure is the median of `--repeats` measurements, with the lowest and the highest. The loader and the sampler need
no files: latents of the size of ImageNet's are drawn at random, and the model's weights are the initial ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from promoe_ds.data import build_dataset, shards
from promoe_ds.data.batches import BatchMaker, share_of
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.images import open_images
from promoe_ds.data.latents import SD_CODEC
from promoe_ds.models.init import build, materialize
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.generate import How, draw_pixels
from promoe_ds.utils.files import file_digest


def rate(images: int, work: Callable[[], object], repeats: int) -> str:
    """Images a second: median (lowest to highest), and what an otherwise idle core would do by its CPU time."""
    work()
    found, spent = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(images / (time.perf_counter() - start))
    cpu = (time.process_time() - spent) / images / repeats
    range_ = f"{min(found):,.1f} to {max(found):,.1f}"
    return f"{statistics.median(found):,.1f} images/s ({range_}); {cpu * 1e3:.3g} ms of CPU an image"


def random_shards(folder: Path, items: int, size: int = 1024) -> None:
    """Moments of ImageNet's shape, 2 x 8 x 32 x 32 in float16, in shards of `size`."""
    rng, made = np.random.default_rng(0), []
    count = -(-items // size)
    for number in range(count):
        path = folder / shards.shard_name(number, count)
        shards.write_tensors(path, {"moments": rng.standard_normal((size, 2, 8, 32, 32), np.float32).astype("f2")})
        made.append(shards.Shard(path.name, size, path.stat().st_size, file_digest(path)))
    items = size * count
    shards.write_tensors(folder / shards.ITEMS, {"label": np.arange(items) % 1000, "names": np.zeros(1, np.uint8)})
    names = [f"{i:04d}" for i in range(1000)]
    digest = file_digest(folder / shards.ITEMS)
    index = shards.Index(names, items, [2, 8, 32, 32], "float16", 256, "", SD_CODEC, digest, made, [])
    shards.write_index(folder, index)


def loader(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        random_shards(Path(folder), 8192)
        config = load_config("imagenet256_promoe_s", [f"data.path={folder}"])
        config = replace(config, train=replace(config.train, global_batch_size=args.batch))
        data = build_dataset(config)
        maker = BatchMaker(config, data, share_of(config, 0, 1))
        steps = iter(range(10**6))
        print(f"loader, whole step (order, posterior, flip, label drop, noise): "
              f"{rate(args.batch, lambda: maker.step(next(steps)), args.repeats)}")  # fmt: skip
        indices = np.random.default_rng(1).integers(0, len(data), (10**4, args.batch))
        rows = iter(indices)
        print(f"loader, reading alone (posterior mean): {rate(args.batch, lambda: data.get(next(rows)), args.repeats)}")


def encode(args: argparse.Namespace) -> None:
    codec, device = open_codec(args.vae, args.device), torch.device(args.device)
    x = torch.rand(args.batch, 3, args.size, args.size, device=device) * 2 - 1
    with torch.inference_mode():
        z = codec.encode(x)[:, : codec.channels]
        both = rate(args.batch, lambda: (codec.encode(x), codec.encode(x.flip(-1))), args.repeats)
        back = rate(args.batch, lambda: codec.decode(z), args.repeats)
    print(f"encode both flips, {codec.kind} at {args.size}: {both}\ndecode, {codec.kind} at {args.size}: {back}")


def sample(args: argparse.Namespace) -> None:
    config, device = load_config(args.config), torch.device(args.device)
    model = materialize(build(config), 0).to(device).eval()
    labels = np.arange(args.batch) % config.model.num_classes
    how = How(1.5, args.steps, batch=args.batch, precision=args.precision)

    def work() -> object:
        return draw_pixels(model, config, labels, np.arange(args.batch), how, device)

    with torch.no_grad():
        found = rate(args.batch * args.steps, work, args.repeats)
    print(f"sample {config.name}, cfg 1.5, {args.precision}: {found.replace('images/s', 'image steps/s')}")


def storage(args: argparse.Namespace) -> None:
    codec = open_codec(args.vae, args.device)
    images = open_images(args.images, split="test", channels=3, image_size=args.size)
    x, _ = images.get(np.linspace(0, len(images) - 1, args.batch).astype(int))
    with torch.inference_mode():
        z = codec.encode(x)[:, : codec.channels]
        half = z.half().float()
        exact, stored = (codec.decode(latent).clamp(-1, 1) for latent in (z, half))

    def psnr(y: torch.Tensor) -> float:
        return float((-10 * torch.log10((((x - y) / 2) ** 2).mean((1, 2, 3)))).mean())

    print(f"{codec.kind} at {args.size}, {args.batch} pictures: latent mean {z.mean():.3f} std {z.std():.3f}; "
          f"round trip {psnr(exact):.3f} dB, through float16 {psnr(stored):.3f} dB; largest change of a pixel "
          f"{float((exact - stored).abs().max()) * 127.5:.3f} of 255 levels; relative error of latents "
          f"{float((z - half).norm() / z.norm()):.1e}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("loader", "encode", "sample", "storage"), required=True)
    parser.add_argument("--vae", default="identity")
    parser.add_argument("--images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--config", default="imagenet256_promoe_s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    {"loader": loader, "encode": encode, "sample": sample, "storage": storage}[args.part](args)


if __name__ == "__main__":
    main()
