"""Encode images to sharded latents, on any number of processes; the same command again continues."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.data import notes
from promoe_ds.data.caches import open_latents
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.encode import ConvertedLatents, EncodedImages, EncodeJob, Encoder, renamed, run_encoding
from promoe_ds.data.images import open_images
from promoe_ds.data.shards import DTYPES, verify
from promoe_ds.utils.command_line import (
    Parser,
    add_cache_options,
    cache_options,
    check_positive,
    launcher,
    own_words,
    versions,
)
from promoe_ds.utils.outputs import check_place
from promoe_ds.utils.pictures import IMAGE_MODES
from promoe_ds.utils.ranks import Ranks

EXAMPLES = """examples:
  python launchers/encode_latents.py --images imagenet/train --vae sd-vae-ft-mse --out latents --dry-run
  torchrun --nproc-per-node 8 -- launchers/encode_latents.py --images imagenet/train --vae sd-vae-ft-mse --out latents
  srun --ntasks 64 python launchers/encode_latents.py --images imagenet/train --vae sd-vae-ft-mse --out latents
  python launchers/encode_latents.py --images imagenet-1k/data --split validation --vae sd-vae-ft-mse --out latents
  python launchers/encode_latents.py --images tinyimagenet.npz --size 128 --vae taef2 --out latents
  python launchers/encode_latents.py --from-latents sd-vae-ft-mse_Latents_256img_npz --out latents
  python launchers/encode_latents.py --verify latents                                        reads every byte

Then train with data.name=latents data.path=latents. Each image is encoded once, whatever the number of processes, and
the shards are the same bytes. Exit codes: 0 done, 2 user error or damaged images, 85 stopped (the same command
continues), 130 by Ctrl-C.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="PATH", help="folder per class, Parquet, tars, zip, packed npz: any images")
    source.add_argument("--from-latents", type=Path, metavar="PATH", help="latents that another project wrote")
    source.add_argument("--verify", type=Path, metavar="DIR", help="compare finished shards with their checksums")
    p.add_argument("--vae", metavar="PATH", help="AutoencoderKL or AutoencoderTiny (diffusers), TAEF2, or identity")
    add_cache_options(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards")
    p.add_argument("--split", default="train", help="where names or a pack have several (default train)")
    p.add_argument("--size", type=int, default=256, help="side of the central square in pixels (default 256)")
    p.add_argument("--batch", type=int, default=32, help="images per forward and process (default 32)")
    p.add_argument("--shard-size", type=int, default=1024, help="images per shard (default 1024)")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of the shards (default float16)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the codec (default fp32)")
    p.add_argument("--skip-damaged", action="store_true", help="leave damaged images out; the index lists them")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers may add it
    return p


def check(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for options that are missing, out of range, or would not be looked at."""
    if args.verify is not None:
        for key, value in vars(args).items():
            if key not in ("verify", "local_rank") and value != parser().get_default(key):
                reject(f"--{key.replace('_', '-')}", value, "--verify reads shards and writes nothing", "remove it")
        return
    check_positive(args, "size", "batch", "shard_size")
    if args.out is None:
        raise ConfigError("--out is required; see --help")
    check_place(args.out)
    if args.images is not None and args.vae is None:
        raise ConfigError("--vae is required with --images; see --help")
    for key in ("vae", "split", "size", "batch", "precision", "device"):
        value = getattr(args, key)
        if args.images is None and value != parser().get_default(key):
            option = "--" + key.replace("_", "-")
            reject(option, value, "--from-latents copies latents as they are", "remove it")
    for key in ("format", "scale", "shift"):
        if args.images is not None and getattr(args, key) is not None:
            reject(f"--{key}", getattr(args, key), "belongs to --from-latents", "remove it")


def open_source(args: argparse.Namespace, ranks: Ranks) -> EncodedImages | ConvertedLatents:
    """The codec is opened first: it is the usual thing to be absent, and listing a million files takes a while."""
    if args.images is None:
        try:
            return ConvertedLatents(open_latents(args.from_latents, cache_options(args)))
        except ConfigError as error:
            raise ConfigError(renamed(error, "--from-latents")) from error
    device = ranks.pick_device(args.device)
    codec = open_codec(args.vae, device)
    try:
        images = open_images(args.images, split=args.split, channels=max(IMAGE_MODES), image_size=args.size)
    except ConfigError as error:
        raise ConfigError(renamed(error, "--images")) from error
    return EncodedImages(images, codec, args.batch, device, args.precision)


def describe(source: EncodedImages | ConvertedLatents, args: argparse.Namespace) -> str:
    items, (flips, channels, side, _) = len(source.label_N), source.shape
    size = items * flips * channels * side * side * (2 if args.dtype == "float16" else 4)
    scale = source.codec["scale"]
    posterior = "mean and log-variance" if source.codec["stochastic"] else "one point"
    return (
        f"{items:,} items of {len(source.classes):,} classes, {flips} x {channels}x{side}x{side} each "
        f"({source.codec['kind'] or 'codec not named'}, {posterior}, "
        f"scale {'per channel' if isinstance(scale, list) else scale}), {args.dtype}: {size / 1e9:.2f} GB in "
        f"{-(-items // args.shard_size)} shards; the model needs model.image_size={side} "
        f"model.channels={source.codec['channels']} model.num_classes={len(source.classes)}"
    )


def encode(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    ranks = Ranks.from_environment(srun=True)
    check(args)
    if args.verify is not None:
        index = verify(args.verify)
        print(f"{index.items} items in {len(index.shards)} shards match their checksums")
        return
    source = open_source(args, ranks)
    if ranks.rank == 0:
        print(describe(source, args), flush=True)
        for note in notes(source.data):
            print(f"{args.images or args.from_latents}: {note}", flush=True)
    if args.dry_run:
        return
    job = EncodeJob(args.out, args.shard_size, args.dtype, args.precision, args.skip_damaged)
    command = shlex.join(["launchers/encode_latents.py", *own_words(argv)])
    index = run_encoding(Encoder(source, job, command, versions()), ranks)
    if index is not None:
        skipped = f", {len(index.skipped)} damaged left out" if index.skipped else ""
        print(f"{index.items} items in {len(index.shards)} shards in {args.out}{skipped}", flush=True)


main, console = launcher(encode)

if __name__ == "__main__":
    console()
