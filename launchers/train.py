#!/usr/bin/env python
"""Train a diffusion transformer with DeepSpeed expert parallelism. The same command again resumes.

examples:
  python launchers/train.py                                              digits on this machine, one process
  deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json parallel.expert_parallel=2
  deepspeed launchers/train.py --config cifar10_promoe_s data.path=cifar10.npz --ds_config ds_configs/zero1.json
  torchrun --nproc-per-node 8 -- launchers/train.py --config cifar10_promoe_s data.path=cifar10.npz \\
      parallel.expert_parallel=4 --run runs/cifar           (torchrun needs the lone --)
  python launchers/train.py --config imagenet256_promoe_xl --dry-run --world 64 parallel.expert_parallel=4
  python launchers/train.py --config digits train.steps=2000 --run runs/longer
  deepspeed launchers/train.py --config imagenet256_promoe_b data.name=images data.path=imagenet/train \\
      data.vae=sd-vae-ft-mse                                (without a cache of latents: the step encodes)
  deepspeed launchers/train.py --config promoe_b/config.yaml train.init=promoe_b data.path=latents --run runs/tuned
                                  (fine-tuning: promoe_b is what launchers/import_weights.py or export.py made)

exit codes: 0 done, 2 a mistake in the command or the configuration, 85 stopped by SIGTERM, SIGUSR2 or SIGHUP after
saving, 130 by Ctrl-C after saving (the file RUN/requeue says so too: the same command continues), 1 anything else;
launchers have codes of their own (docs/training.md): torchrun makes every failure 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promoe_ds.utils import signals  # noqa: E402

if __name__ == "__main__":
    signals.listen()  # before the slow imports

from promoe_ds.config.errors import ConfigError, reject  # noqa: E402
from promoe_ds.config.schema import Config  # noqa: E402
from promoe_ds.utils.command_line import STOPPED, USER_ERROR, Parser, mistake  # noqa: E402

if TYPE_CHECKING:
    from promoe_ds.evaluation.evaluate import Evaluator
    from promoe_ds.utils.ranks import Ranks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", metavar="NAME|PATH", help="recipe name or YAML file (digits)")
    parser.add_argument("--ds_config", metavar="PATH|NAME", help="DeepSpeed JSON (ds_configs/zero2.json, or zero2)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (runs/RECIPE)")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, memory, groups and the DeepSpeed JSON")
    parser.add_argument(
        "--check-files",
        action="store_true",
        help="with --dry-run: look into the data, the run folder and other files that a start reads, too",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: one JSON object on stdout")
    text = "end with 0, not 85 or 130, when a signal stopped the run (for batch scripts, which test RUN/requeue)"
    parser.add_argument("--exit-zero-on-signal", action="store_true", help=text)
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: number of GPUs to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the recipe")
    args = parser.parse_intermixed_args(argv)
    if args.world is not None and not args.dry_run:
        parser.error("--world is for --dry-run; start several processes with deepspeed, torchrun or srun")
    for name in ("json", "check_files"):
        if getattr(args, name) and not args.dry_run:
            parser.error(f"--{name.replace('_', '-')} is for --dry-run")
    return args


def prepare_environment() -> None:
    """Share the CPU cores between the processes of this machine (unless OMP_NUM_THREADS is set); before torch.

    Raises ConfigError where launchers' variables are no numbers.
    """
    name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local = os.environ.get(name) or "1"
    if not local.isdecimal() or not int(local):
        reject(f"environment {name}", repr(local), "is not a number of processes", "unset it")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(local))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the other processes
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed would look for one, and warn


def run_folder(args: argparse.Namespace, config: Config) -> Path:
    """Where the run lies. Raises ConfigError if that is in another run."""
    from promoe_ds.utils.outputs import check_run_place

    run = args.run or Path("runs") / config.name
    check_run_place(run)
    return run


def dry_run(args: argparse.Namespace, config: Config) -> int:
    from promoe_ds.costs.dry_run import render, report
    from promoe_ds.parallel import ds_config
    from promoe_ds.utils.ranks import number

    world = number("WORLD_SIZE", 1) if args.world is None else args.world
    if args.check_files:
        check_files(args, config)
    ds = ds_config.resolve(args.ds_config, config, world)
    facts = report(config, ds, world)
    print(json.dumps(facts) if args.json else render(facts))
    return 0


def check_files(args: argparse.Namespace, config: Config) -> None:
    """What a start would meet in the files it reads; writes nothing. Raises ConfigError."""
    from promoe_ds.checkpoint.init_from import InitialWeights
    from promoe_ds.checkpoint.layout import find_whole
    from promoe_ds.checkpoint.resume import check_run
    from promoe_ds.data import build_dataset, notes
    from promoe_ds.recipes.validate import validate_data
    from promoe_ds.train.scores import Scores
    from promoe_ds.utils.ranks import ALONE

    run = run_folder(args, config)
    validate_data(config)
    dataset = build_dataset(config)
    for note in notes(dataset):
        print(f"data.path={config.data.path}: {note}", file=sys.stderr)
    check_run(run, config)
    check_guide(config)
    found = find_whole(run, ALONE, read_bytes=False)
    if config.train.init and found is None:
        InitialWeights(config)
    if config.train.score_every:
        Scores(config, ALONE, dataset.codec, make_evaluator)


def check_guide(config: Config) -> None:
    """Raises ConfigError if there is no such model as `guidance.model`, which is not read before the first samples:
    those of `train.sample_every`, or those at the end."""
    from promoe_ds.sampling.weak import find_weak

    if config.guidance.model:
        find_weak(config.guidance.model, config, "guidance.model")


def make_evaluator(config: Config, ranks: Ranks, shape: tuple[int, int, int]) -> Evaluator:
    """What scores images [H, W, C] while training. Raises ConfigError, in the words of a recipe."""
    import numpy as np

    from promoe_ds.evaluation.evaluate import Evaluator
    from promoe_ds.evaluation.extractors import usual_features
    from promoe_ds.evaluation.samples import SampleSet

    ref = config.train.score_ref or "digits"
    features = config.train.score_features or usual_features(ref)
    classes = np.array([0, config.model.num_classes - 1])
    try:
        evaluator = Evaluator(features, ref, device=ranks.device, ranks=ranks)
        evaluator.check(SampleSet("the model's", np.zeros((1, *shape), np.uint8), classes))
        evaluator.extractor.try_out(shape)
    except ConfigError as error:
        raise ConfigError(in_keys(str(error), features)) from error
    return evaluator


def in_keys(text: str, features: str) -> str:
    """What launchers/evaluate.py says of its options, said of the keys of a recipe and of environment variables."""
    key = f"train.score_features={features}"
    if text.startswith("SAMPLES="):  # nobody can choose other images here
        conflict = text.partition(": ")[2].rpartition("; ")[0]
        return f"{key}: the model's {conflict}; choose another network"
    text = re.sub(r"--(inception|dinov2)-weights or ", "", text)
    text = re.sub(r"^--(inception|dinov2)-weights=\(none\)", key, text)
    text = re.sub(r"--(inception|dinov2)-weights", lambda match: f"{match[1].upper()}_WEIGHTS", text)
    text = text.replace("add --features ", "set train.score_features=")
    return text.replace("--features", "train.score_features").replace("--ref", "train.score_ref")


def train(args: argparse.Namespace, config: Config) -> int:
    from promoe_ds.parallel import ds_config, topology
    from promoe_ds.recipes.validate import validate_data
    from promoe_ds.train.trainer import RankFailed, StoppedEarly, Trainer, TrainingStopped
    from promoe_ds.utils.ranks import Ranks

    run = run_folder(args, config)
    validate_data(config)
    check_guide(config)
    here = topology.Topology.of(Ranks.from_environment(), config.parallel.expert_parallel)
    ds = ds_config.resolve(args.ds_config, config, here.world)
    trainer = None
    try:
        trainer = Trainer(config, ds, run, here, make_evaluator)
        code = trainer.run()
    except StoppedEarly:
        code = STOPPED
    except (ConfigError, RankFailed, TrainingStopped) as error:
        if isinstance(error, ConfigError) and not topology.watched():
            raise
        return topology.fail(str(error), 1 if isinstance(error, TrainingStopped) else USER_ERROR, here)
    except Exception as error:
        return topology.crash(error, here)
    finally:
        if trainer is not None:
            trainer.close()
    topology.disconnect()
    if code == STOPPED and args.exit_zero_on_signal:
        code = 0
    elif code == STOPPED and signals.requested() == "SIGINT":
        code = signals.INTERRUPTED
    return code if here.world == 1 else topology.leave(code)


def main(argv: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, about what deepspeed calls
    try:
        prepare_environment()
        args = parse_args(argv)
        from promoe_ds.recipes.load import load_config  # imports torch
        from promoe_ds.utils.ranks import check_accelerator

        config = load_config(args.config, args.overrides)
        check_accelerator(present=not args.dry_run)
        return dry_run(args, config) if args.dry_run else train(args, config)
    except ConfigError as error:
        return mistake(error)


def console() -> None:
    """The command promoe-train: everything slow is imported in `main`."""
    signals.listen()
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
