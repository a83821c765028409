"""Say what lies at a path: which reader, items, classes, what is stored, and whether its numbers are as they should be.

Reads latents (shards, and the caches of other projects) and images. Nothing is written but the sheet.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

import numpy as np
import torch
from PIL import Image

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.data import notes
from promoe_ds.data.caches import LOOKED_FOR, open_latents
from promoe_ds.data.caches.cache import expected_statistics, unlike
from promoe_ds.data.codecs import check_same, open_codec, per_channel
from promoe_ds.data.dataset import ImageDataset
from promoe_ds.data.encode import renamed
from promoe_ds.data.images import LOOKED_FOR as LOOKED_FOR_IMAGES
from promoe_ds.data.images import DecodedImages, image_kinds, open_images
from promoe_ds.data.latents import Latents
from promoe_ds.data.zips import StoredZip
from promoe_ds.sampling.generate import to_pixels
from promoe_ds.utils.command_line import Parser, add_cache_options, cache_options, check_positive, launcher
from promoe_ds.utils.outputs import check_place
from promoe_ds.utils.pictures import SUFFIXES, grid, write_png

EXAMPLES = """examples:
  python launchers/inspect_data.py /data/imagenet-latents
  python launchers/inspect_data.py img512-sd.zip --format edm2
  python launchers/inspect_data.py latents --vae sd-vae-ft-mse --sheet latents.png      look at 16 of them
  python launchers/inspect_data.py imagenet-1k/data --split validation --sheet pictures.png

Exit codes: 0 read, 2 not, or some of the items that were looked at are damaged.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", metavar="PATH", help="folder, zip, npz, Parquet or tar")
    add_cache_options(p)
    p.add_argument("--split", default="train", help="of images, where names or a pack have several (default train)")
    p.add_argument("--items", type=int, default=256, help="how many are looked at, spread over all (default 256)")
    p.add_argument("--vae", metavar="DIR", help="codec that decodes 16 of them, if they are latents")
    p.add_argument("--sheet", type=Path, metavar="PNG", help="where 16 of them go (latents with --vae: sheet.png)")
    return p


def opened(args: argparse.Namespace) -> ImageDataset:
    """Latents, or else images. Raises `ConfigError`."""
    place = Path(args.path).expanduser()
    if args.format or not zip_of_pictures(place):
        try:
            return open_latents(args.path, cache_options(args))
        except ConfigError as error:
            if args.format or LOOKED_FOR not in str(error):
                raise
            if not image_kinds(place):
                conflict = f"holds neither latents nor images: {LOOKED_FOR}; of images: {LOOKED_FOR_IMAGES}"
                reject("data.path", args.path, conflict, "name another path")
    return open_images(args.path, split=args.split, channels=3, image_size=256)


def zip_of_pictures(place: Path) -> bool:
    """Raises `ConfigError` for a zip that is not whole."""
    if not (place.is_file() and place.suffix.lower() == ".zip"):
        return False
    return any(name.lower().endswith(SUFFIXES) for name in map(os.fsdecode, StoredZip(place).names.tolist()))


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


def files(data: DecodedImages, chosen: list[int]) -> str:
    """Formats and sizes of the chosen image files, as far as they are whole."""
    formats, sides = Counter(), []
    for index in chosen:
        try:
            with Image.open(io.BytesIO(data.read(index))) as image:
                formats[f"{image.format} {image.mode}"] += 1
                sides.append(image.size)
        except (ConfigError, OSError):
            continue  # is told as damaged
    if not sides:
        return "no image can be read"
    widths, heights = zip(*sides, strict=True)
    low, high = (f"{of(widths)}x{of(heights)}" for of in (min, max))
    kinds = ", ".join(f"{count} {kind}" for kind, count in formats.most_common())
    return f"image files of {low if low == high else f'{low} to {high}'} pixels: {kinds}"


def describe_latents(data: Latents, args: argparse.Namespace, chosen: list[int], whole: list[np.ndarray]) -> None:
    flips = "and of the mirror image" if data.flips == 2 else "no mirror images (data.hflip=false)"
    shape = "x".join(map(str, data.shape))
    print(f"read by {type(data).__name__}: {data.content} {shape} {data.read(chosen[0], False).dtype}, {flips}")
    print(f"codec: {data.codec['kind'] or 'not named'}, the model sees (z - shift) * scale")
    for note in notes(data):
        print(f"note: {note}")
    if whole:
        print("\n".join(table(data, np.stack(whole)[:, 0, : data.channels].astype(np.float64))))
        model = (f"model.{key}={getattr(data, key)}" for key in ("channels", "image_size", "num_classes"))
        print("train with data.name=latents", f"data.path={args.path}", *model)
        if args.vae:
            codec = open_codec(args.vae)
            check_same(data.codec, codec, f"--vae={args.vae}", args.path)
            some = data.get(spread(np.array(chosen)))[0]
            with torch.inference_mode():
                write_sheet(args.sheet, to_pixels(codec.follow(data.codec).to_pixels(some)))


def describe_images(data: DecodedImages, args: argparse.Namespace, chosen: list[int], whole: list[np.ndarray]) -> None:
    print(f"read by {type(data).__name__}: {data.kind}")
    print(files(data, chosen))
    names = ", ".join(data.classes[:3])
    print(f"classes: {names}{', ...' if data.num_classes > 3 else ''}")
    for note in notes(data):
        print(f"note: {note}")
    if whole:
        print(
            f"train with data.name=images data.path={args.path} model.channels=3 model.num_classes={data.num_classes}"
        )
        if args.sheet:
            write_sheet(args.sheet, spread(np.stack(whole)))


def spread(items: np.ndarray) -> np.ndarray:
    """16 of them at most."""
    return items[np.linspace(0, len(items) - 1, min(16, len(items))).astype(int)]


def write_sheet(path: Path, pixels_NHWC: np.ndarray) -> None:
    write_png(path, grid(pixels_NHWC, 4))
    print(f"{len(pixels_NHWC)} of them: {path}")


def inspect(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    check_positive(args, "items")
    args.sheet = args.sheet or (Path("sheet.png") if args.vae else None)
    if args.sheet and not args.sheet.parent.is_dir():
        reject("--sheet", args.sheet, f"there is no folder {args.sheet.parent}", "make it, or name another file")
    if args.sheet and args.sheet.is_dir():
        reject("--sheet", args.sheet, "is a folder", "name a file in it")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        reject("--sheet", args.sheet, "the sheet is a PNG", "choose a name that ends in .png")
    if args.sheet:
        check_place(args.sheet, "--sheet")
        if args.sheet.exists():
            reject("--sheet", args.sheet, "exists; nothing is overwritten", "name another file, or remove this one")
    try:
        data = opened(args)
    except ConfigError as error:
        raise ConfigError(renamed(error, "PATH")) from error
    assert isinstance(data, DecodedImages | Latents)
    if args.sheet and not args.vae and isinstance(data, Latents):
        reject("--sheet", args.sheet, "latents are drawn by their codec", "add --vae, or leave it out")
    if args.vae and not isinstance(data, Latents):
        reject("--vae", args.vae, "PATH holds pictures", "leave it out")
    chosen = np.unique(np.linspace(0, len(data) - 1, min(args.items, len(data))).astype(int)).tolist()
    whole, damaged = look(data, chosen)
    counts = np.bincount(data.label_B, minlength=data.num_classes)
    each = f"{counts.min():,} to {counts.max():,}"
    print(f"{args.path}: {len(data):,} items of {data.num_classes:,} classes, {each} of each")
    if isinstance(data, Latents):
        describe_latents(data, args, chosen, whole)
    else:
        describe_images(data, args, chosen, whole)
    print("\n".join(f"damaged: {renamed(ConfigError(text), 'PATH')}" for text in damaged) or "no damaged item", end=" ")
    print(f"({len(damaged)} of the {len(chosen)} looked at)")
    return 2 if damaged else 0


main, console = launcher(inspect)

if __name__ == "__main__":
    console()
