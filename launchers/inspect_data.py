"""Say what lies at a path: which reader, items, classes, what is stored, and whether its numbers are as they should be.

Reads latents (shards, and the caches of other projects) and images. Nothing is written but the sheet of --vae.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

import numpy as np
import torch

from promoe_ds.config.schema import ConfigError
from promoe_ds.data import notes
from promoe_ds.data.caches import LOOKED_FOR, open_latents
from promoe_ds.data.caches.cache import expected_statistics, unlike
from promoe_ds.data.codecs import check_same, open_codec, per_channel
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.encode import renamed
from promoe_ds.data.images import DecodedImages, open_images
from promoe_ds.data.latents import Latents
from promoe_ds.sampling.generate import to_pixels
from promoe_ds.utils.command_line import Parser, add_cache_options, cache_options, check_positive, launcher
from promoe_ds.utils.pictures import grid, write_png

EXAMPLES = """examples:
  python launchers/inspect_data.py /data/imagenet-latents
  python launchers/inspect_data.py img512-sd.zip --format edm2
  python launchers/inspect_data.py latents --vae sd-vae-ft-mse --sheet latents.png      look at 16 of them

Exit codes: 0 read, 2 not, or some of the items that were looked at are damaged.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", metavar="PATH", help="folder, zip or npz")
    add_cache_options(p)
    p.add_argument("--items", type=int, default=256, help="how many are looked at, spread over all (default 256)")
    p.add_argument("--vae", metavar="DIR", help="codec that decodes 16 of them")
    p.add_argument("--sheet", type=Path, metavar="PNG", default="sheet.png", help="where they go (default sheet.png)")
    return p


def opened(args: argparse.Namespace) -> ImageDataset:
    """Latents, or else images. Raises `ConfigError`."""
    try:
        return open_latents(args.path, cache_options(args))
    except ConfigError as error:
        if args.format or (LOOKED_FOR not in str(error) and "is not a whole" not in str(error)):
            raise
        try:
            return open_images(args.path, split="train", channels=3, image_size=256)
        except ConfigError:
            raise error from None


def look(data: DecodedImages | Latents, chosen: list[int]) -> tuple[list[np.ndarray], list[str]]:
    """The chosen items, and what is wrong with the others: a line each."""
    whole, damaged = [], []
    for index in chosen:
        try:
            x = data.load(index)
        except ConfigError as error:
            damaged.append(str(error))
            continue
        if np.isfinite(x).all():
            whole.append(x)
        else:
            damaged.append(f"data.path={data.where(index)}: holds values that are not finite; write it again")
    return whole, damaged


def table(data: Latents, z_NChw: np.ndarray) -> list[str]:
    """Mean and standard deviation per channel beside what they should be."""
    codec = data.codec
    scale, shift = (np.broadcast_to(per_channel(codec[key]).ravel(), data.channels) for key in ("scale", "shift"))
    mean, std, known = z_NChw.mean((0, 2, 3)), z_NChw.std((0, 2, 3)), expected_statistics(codec)
    lines = ["channel     mean      std  should be           scale    shift   mean x    std x"]
    for c in range(data.channels):
        should = f"{known[0][c]:8.3f} {known[1][c]:8.3f}" if known else f"{'unknown':>17}"
        x = f"{(mean[c] - shift[c]) * scale[c]:8.3f} {std[c] * abs(scale[c]):8.3f}"
        lines.append(f"{c:7} {mean[c]:8.3f} {std[c]:8.3f} {should} {scale[c]:10.5f} {shift[c]:8.3f} {x}")
    if known:
        far = unlike((mean, std), known)
        say = f"channels {', '.join(map(str, np.flatnonzero(far)))} are not: another codec, scale or kind of picture"
        lines.append(say if far.any() else "all channels are as they should be")
    return lines


def inspect(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    check_positive(args, "items")
    try:
        data = opened(args)
    except ConfigError as error:
        raise ConfigError(renamed(error, "PATH")) from error
    assert isinstance(data, DecodedImages | Latents)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(args.items, len(data))).astype(int)).tolist()
    whole, damaged = look(data, chosen)
    counts = np.bincount(data.label_B, minlength=data.num_classes)
    each = f"{counts.min():,} to {counts.max():,}"
    print(f"{args.path}: {len(data):,} items of {data.num_classes:,} classes, {each} of each")
    if isinstance(data, Latents):
        flips = "and of the mirror image" if data.flips == 2 else "no mirror images (data.hflip=false)"
        shape = "x".join(map(str, data.shape))
        print(f"read by {type(data).__name__}: {data.content} {shape} {data.read(chosen[0], False).dtype}, {flips}")
        print(f"codec: {data.codec['kind'] or 'not named'}, the model sees (z - shift) * scale")
    else:
        print(f"read by {type(data).__name__}: image files, cropped and resized as they are read")
    for note in notes(data):
        print(f"note: {note}")
    if isinstance(data, Latents) and whole:
        print("\n".join(table(data, np.stack(whole)[:, 0, : data.channels].astype(np.float64))))
        model = (f"model.{key}={getattr(data, key)}" for key in ("channels", "image_size", "num_classes"))
        print("train with data.name=latents", f"data.path={args.path}", *model)
        if args.vae:
            codec = open_codec(args.vae)
            check_same(data.codec, codec, f"--vae={args.vae}", args.path)
            some = np.array(chosen)[np.linspace(0, len(chosen) - 1, min(16, len(chosen))).astype(int)]
            with torch.inference_mode():
                write_png(args.sheet, grid(to_pixels(codec.follow(data.codec).to_pixels(data.get(some)[0])), 4))
            print(f"{len(some)} of them: {args.sheet}")
    print("\n".join(f"damaged: {renamed(ConfigError(text), 'PATH')}" for text in damaged) or "no damaged item", end=" ")
    print(f"({len(damaged)} of the {len(chosen)} looked at)")
    return 2 if damaged else 0


main, console = launcher(inspect)

if __name__ == "__main__":
    console()
