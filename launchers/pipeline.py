"""Encode, train, sample and score one recipe: the four launchers in turn, each skipped where its result is there.

With data.name=images and --vae nothing is encoded beforehand: the training step does it.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.layout import find_whole, newest, step_of, trained
from promoe_ds.checkpoint.resume import changed_rates, check_run
from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.schema import Config
from promoe_ds.data.codecs import find_codec, open_codec
from promoe_ds.data.images import LOOKED_FOR
from promoe_ds.data.shards import ITEMS, read_index
from promoe_ds.diffusion.objective import choose_sampler
from promoe_ds.evaluation.inception import find_weights
from promoe_ds.recipes.load import load_config
from promoe_ds.sampling.weak import find_weak
from promoe_ds.utils.command_line import DONE, USER_ERROR, Parser, check_positive, launcher, parse_scales, parse_steps
from promoe_ds.utils.files import read_json
from promoe_ds.utils.outputs import RECORD, SAMPLES, check_run_place
from promoe_ds.utils.ranks import ALONE, check_accelerator

HERE = Path(__file__).resolve().parent
DIGITS = "digits"
"""the data set that is its own reference"""
STAGES = ("encode", "train", "sample", "evaluate")
SIZE = 256

EXAMPLES = """examples:
  python launchers/pipeline.py digits --num 1000 --cfg 1.0,2.0 --steps 50
  python launchers/pipeline.py imagenet256_promoe_b --processes 8 --images imagenet/train --vae sd-vae-ft-mse \\
      --ref VIRTUAL_imagenet256_labeled.npz --inception-weights pt_inception-2015-12-05-6726825d.pth
  python launchers/pipeline.py imagenet256_promoe_b --latents latents --vae sd-vae-ft-mse --dry-run train.steps=1000
  python launchers/pipeline.py imagenet256_promoe_b data.name=images --images imagenet/train --vae sd-vae-ft-mse ...

The same command again continues where it stopped. --dry-run prints the commands, which can also be run one by one (on
several nodes, through srun); --check-files looks at files before. Exit codes: 0 done, 2 user error, otherwise that of
the launcher that stopped.
"""


@dataclass(frozen=True)
class Stage:
    """One launcher with its words, and whether its result is there already."""

    name: str
    script: str
    words: list[str]
    done: Callable[[], bool]

    def command(self, processes: int) -> list[str]:
        script = str(HERE / self.script)
        if processes == 1:
            return [sys.executable, script, *self.words]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*torchrun, "--", script, *self.words]


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe", metavar="RECIPE", help="name or YAML file")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    p.add_argument("--run", type=Path, metavar="DIR", help="run folder (default runs/RECIPE)")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (default 1)")
    p.add_argument("--images", metavar="PATH", help="encode these, as launchers/encode_latents.py")
    p.add_argument("--size", type=int, help="side in pixels of what is encoded (default 256)")
    p.add_argument("--latents", type=Path, metavar="DIR", help="shards, made if absent (default RUN/latents)")
    p.add_argument("--vae", metavar="PATH", help="codec, for recipes of latents, and images that the step encodes")
    p.add_argument("--ds_config", metavar="PATH", help="DeepSpeed JSON of the training")
    p.add_argument("--num", type=int, default=50_000, help="samples per guidance scale (default 50000)")
    p.add_argument("--cfg", default="1.0,1.5", metavar="S[,S...]", help="guidance scales (default 1.0,1.5)")
    p.add_argument("--steps", type=parse_steps, default=250, help="of the sampler (default 250)")
    p.add_argument("--batch", type=int, default=64, help="images per forward of encoder and sampler (default 64)")
    p.add_argument("--ref", metavar="REF", help="of launchers/evaluate.py")
    p.add_argument("--features", metavar="NAME", help="of launchers/evaluate.py")
    p.add_argument("--inception-weights", metavar="PATH", help="of launchers/evaluate.py")
    p.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    p.add_argument("--dry-run", action="store_true", help="print the commands, and which are done")
    p.add_argument("--check-files", action="store_true", help="with --dry-run: look at files, as a start does, too")
    return p


def stages_of(args: argparse.Namespace, config: Config) -> list[Stage]:
    """What is to run, in order; each is judged anew when its turn comes."""
    run, latent, size = args.run or Path("runs") / config.name, config.data.name == "latents", args.size or SIZE
    shards = args.latents or (Path(config.data.path) if config.data.path else run / "latents")
    vae = ["--vae", args.vae] if args.vae else []
    packs = [run / "samples" / f"cfg{scale}" / SAMPLES for scale in parse_scales(args.cfg)]
    batch, out = str(args.batch), []
    if latent and args.images:
        words = ["--images", args.images, "--size", str(size), "--out", str(shards), "--batch", batch, *vae]
        out.append(Stage("encode", "encode_latents.py", words, lambda: encoded(shards, size)))
    given = {"data.path": shards} if latent else {"data.path": args.images, "data.vae": args.vae}
    data = [f"{key}={value}" for key, value in given.items() if value]
    ds = ["--ds_config", args.ds_config] if args.ds_config else []
    words = ["--config", args.recipe, "--run", str(run), *ds, *data, *args.overrides]
    out.append(Stage("train", "train.py", words, lambda: trained(run, config.train.steps)))
    words = ["--run", str(run), "--num", str(args.num), "--cfg", args.cfg, "--steps", str(args.steps)]
    words += ["--batch", batch, "--format", "npz", *vae]

    def drawn() -> bool:
        """From the newest checkpoint, which must be the last."""
        step = {"checkpoint_step": step_of(found)} if (found := newest(run)) else {}
        return trained(run, config.train.steps) and sampled(packs, {"num": args.num, "steps": args.steps, **step})

    out.append(Stage("sample", "sample.py", words, drawn))
    options = {"--ref": args.ref, "--features": args.features, "--inception-weights": args.inception_weights}
    words = ["--run", str(run), *(word for key, value in options.items() if value for word in (key, value))]
    out.append(Stage("evaluate", "evaluate.py", words, lambda: scored(run / "metrics.json", packs, args.ref or DIGITS)))
    last = STAGES.index(args.until)
    return [stage for stage in out if STAGES.index(stage.name) <= last]


def encoded(shards: Path, size: int) -> bool:
    """Whether all shards are there, of the lengths that their index says, made at this size."""
    try:
        index = read_index(shards)
    except ConfigError:
        return False
    return (shards / ITEMS).is_file() and index.image_size == size


def read(path: Path) -> dict[str, Any]:
    """A file of JSON; {} if it is absent or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sampled(packs: list[Path], wanted: dict[str, int | str]) -> bool:
    """Whether every scale has its packed samples, and their record says what is wanted."""
    return all(pack.exists() and wanted.items() <= read(pack.with_name(RECORD)).items() for pack in packs)


def scored(metrics: Path, packs: list[Path], reference: str) -> bool:
    """Whether the scores are there, against this reference, and newer than the samples."""
    known = read(metrics).get("reference")
    against = known.get("name") if isinstance(known, dict) else None
    return (
        isinstance(against, str)
        and Path(against) == Path(reference)
        and all(pack.exists() and pack.stat().st_mtime <= metrics.stat().st_mtime for pack in packs)
    )


def check(args: argparse.Namespace, config: Config) -> None:
    """What a later stage needs is asked for now, not after days of training. Raises `ConfigError`."""
    check_positive(args, "processes", "num", "size", "batch", "steps")
    parse_scales(args.cfg)
    choose_sampler(config, None, args.steps)
    if config.data.name == "latents":
        if not args.vae or not (args.images or args.latents or config.data.path):
            missing = "--images" if args.vae else "--vae"
            way_out = "add --vae DIR, and --images DIR or --latents DIR"
            reject(missing, "(none)", f"{config.name} trains on latents", way_out)
        return
    images = config.data.name == "images"
    for key in ("latents", "vae", "images"):
        if (value := getattr(args, key)) and not (images and key != "latents"):
            reject(f"--{key}", value, f"data.name={config.data.name} has no latents", "remove it")
    if args.vae and not (args.images or config.data.path):
        reject("--images", "(none)", "there is nothing to encode in the step", "add --images PATH")
    if args.images and not (args.vae or config.data.vae):
        reject("--vae", "(none)", "pixels are trained on with data.path=PATH", "add --vae DIR to encode in the step")


def check_size(size: int, cells: int, vae: str) -> None:
    """Raise `ConfigError` if --size is not the side of the pictures that the step encodes."""
    codec = open_codec(vae)
    if size % codec.factor:
        conflict = f"is not divisible by the {codec.factor} pixels of a latent cell of {codec.kind}"
        reject("--size", size, conflict, f"leave it out: model.image_size={cells} decides")
    if size != cells * codec.factor:
        conflict = f"model.image_size={cells} cells of {codec.factor} pixels are {cells * codec.factor}"
        reject("--size", size, conflict, f"set model.image_size={size // codec.factor}, or leave it out")


def check_images(option: str, path: str) -> None:
    """Raise `ConfigError`, as the reader of images would, if nothing is there."""
    if not Path(path).expanduser().exists():
        reject(option, path, "does not exist", f"name {LOOKED_FOR}")


def check_files(args: argparse.Namespace, config: Config) -> None:
    """The same for files; a dry run does without, unless it is asked to. Raises `ConfigError`."""
    check_accelerator(present=not args.dry_run)
    from promoe_ds.parallel import ds_config  # imports DeepSpeed

    run = args.run or Path("runs") / config.name
    check_run_place(run)
    check_run(run, config)  # its stages are not those of this command, whatever is there
    changed_rates(find_whole(run, ALONE, read_bytes=False), config)
    ds_config.resolve(args.ds_config, config, args.processes)
    if config.train.init and newest(run) is None:
        InitialWeights(config)
    to_train = not trained(run, config.train.steps)
    if to_train and config.moe is not None:
        config.moe.router.validate_files(config)
    if config.guidance.model:
        find_weak(config.guidance.model, config, "guidance.model")
    latents = config.data.name == "latents"
    shards = Path(args.latents or config.data.path or run / "latents")
    if args.vae:
        find_codec(args.vae)
    if args.vae and args.size and not latents:
        check_size(args.size, config.model.image_size, args.vae)
    if latents and not args.images and not shards.exists():
        reject("--latents", shards, "does not exist, and no images are named", "add --images DIR")
    if args.images and (not encoded(shards, args.size or SIZE) if latents else to_train):
        check_images("--images", args.images)
    elif to_train and config.data.name == "images" and config.data.path:
        check_images("data.path", config.data.path)
    features = args.features or ("digits-cnn" if args.ref in (None, DIGITS) else "inception")
    named = {"--ref": args.ref, "--features": features, "--inception-weights": args.inception_weights}
    if to_train and config.train.score_every:
        named |= {"train.score_ref": config.train.score_ref, "train.score_features": config.train.score_features}
    for option, path in named.items():
        if path is None or not (option == "--inception-weights" or Path(path).suffix or "/" in path):
            continue  # a name
        if not Path(path).exists():
            reject(option, path, "no such file", "it would be missed only later; name an existing one")
    if args.until != STAGES[-1]:
        return
    if args.ref is None and config.data.name != DIGITS:
        way_out = "add --ref, or --until sample"
        reject("--ref", "(none)", f"{config.name} is not scored against {DIGITS}", way_out)
    if features == "inception":
        find_weights(args.inception_weights and Path(args.inception_weights))


def follow(command: list[str]) -> int:
    """Run a launcher and return its exit code; a stop is passed on and waited for, so that it can save."""
    child, stopped = Popen(command), None
    while child.returncode is None:
        try:
            child.wait()
        except KeyboardInterrupt as stop:  # another one is passed on too
            stopped = stop
            child.terminate()
    if stopped:
        raise stopped
    return child.returncode


def run_stage(stage: Stage, command: list[str]) -> int:
    """Run a launcher to the end; returns the exit code, 0 only if its result is there."""
    if code := follow(command):
        way_out = "mend what it says" if code == USER_ERROR else "the same command continues"
        print(f"stopped: {stage.name} ended with exit code {code}; {way_out}", file=sys.stderr)
        return code if code > 0 else 128 - code
    if not stage.done():
        text = "without its result; its processes may be running still, and the same command continues after them"
        print(f"stopped: {stage.name} ended with exit code 0, {text}", file=sys.stderr)
        return 1
    return DONE


def pipeline(argv: list[str]) -> int:
    p = parser()
    args = p.parse_intermixed_args(argv)
    if args.check_files and not args.dry_run:
        p.error("--check-files is for --dry-run; a start does it anyway")
    config = load_config(args.recipe, args.overrides)
    check(args, config)
    if args.check_files or not args.dry_run:
        check_files(args, config)
    for number, stage in enumerate(stages_of(args, config), start=1):
        command, done = stage.command(args.processes), stage.done()
        print(f"[{number} {stage.name}{': done' if done else ''}] {shlex.join(command)}", flush=True)
        if done or args.dry_run:
            continue
        if code := run_stage(stage, command):
            return code
    return DONE


main, console = launcher(pipeline)

if __name__ == "__main__":
    console()
