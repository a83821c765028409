"""Draw images from a trained model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.checkpoint.load_weights import find_weights, load_ema
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Channels, Config, Interval, ParallelConfig
from promoe_ds.data.codecs import Codec, check_same, open_codec
from promoe_ds.diffusion.flow_sde import SDE, Diffusion, LastStep
from promoe_ds.diffusion.objective import choose_sampler
from promoe_ds.models.compiled import compile_model, require_compiler
from promoe_ds.models.dit import DiT
from promoe_ds.parallel.rendezvous import joined
from promoe_ds.recipes.validate import check_guidance, check_interval, validate
from promoe_ds.sampling import job as sampling
from promoe_ds.sampling.generate import Pixels, SamplingOptions, check_channels, choose_precision, pixel_shape
from promoe_ds.sampling.protocols import NAMES, Protocol, find_protocol, protocol_record
from promoe_ds.sampling.weak import load_weak
from promoe_ds.utils.command_line import Parser, check_positive, launcher, own_words, parse_scales, parse_steps
from promoe_ds.utils.ranks import Ranks, check_accelerator

EXAMPLES = """examples:
  python launchers/sample.py --run runs/digits --num 100
  python launchers/sample.py --run runs/digits --num 1000 --cfg 1,1.5,4 --steps 50 --out samples
  torchrun --nproc_per_node 8 -- launchers/sample.py --run runs/digits --num 50000 --batch 125
  python launchers/sample.py --model digits_bf16 --num 100        (of launchers/checkpoint.py convert --weights)
  torchrun --nproc_per_node 8 -- launchers/sample.py --run runs/imagenet256_promoe_b --vae sd-vae-ft-mse --num 50000 \\
      --cfg 1.0,1.5 --format npz                             latents are decoded; no 50,000 files
  ... --format features --inception-weights pt_inception-2015-12-05-6726825d.pth         straight to features, no images
  ... --protocol sit                                 as SiT draws its published rows: SDE, labels drawn, 50,000 images
  ... --cfg 1.5 --guidance-interval 100,900          guided only there: 1.8 forwards a step instead of 2
  ... --cfg 2.1 --guidance-model runs/weaker         autoguidance
  deepspeed --num_gpus 8 -- launchers/sample.py --model ema.safetensors --num 50000 --out samples

The lone -- keeps torchrun and deepspeed from taking --run and --num for abbreviations of their own options.
Image i depends on --seed and i alone: not on --batch, not on the number of processes. The same command again finishes
an interrupted folder. Exit codes: 0 done, 2 user error, 85 stopped (the same command continues), 130 by Ctrl-C.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="run folder: its newest complete checkpoint")
    source.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint or converted folder, or a file of it")
    p.add_argument("--vae", metavar="PATH", help="codec that decodes latents (default: data.vae of the run)")
    p.add_argument("--protocol", choices=NAMES, help="defaults as this project draws its published rows")
    p.add_argument("--num", type=int, help="images (default 64)")
    p.add_argument("--labels", choices=("balanced", "random"), help="in turn (default), or drawn")
    p.add_argument("--cfg", metavar="S[,S...]", help="guidance scales; 1 is unguided (default: sample.cfg of the run)")
    add_sampler_options(p)
    p.add_argument("--guidance-channels", choices=("all", "3"), help="(default: the run's guidance.channels)")
    text = "times in 0..1000 that are guided (default: the run's guidance.interval)"
    p.add_argument("--guidance-interval", metavar="LO,HI", help=text)
    text = "weaker model that guides in place of the null label, or none (default: the run's guidance.model)"
    p.add_argument("--guidance-model", metavar="PATH", help=text)
    p.add_argument("--pixels", choices=get_args(Pixels), help="127.5 x + 128 (adm, default) or 255 (x + 1) / 2 (repa)")
    p.add_argument("--seed", type=int, default=0, help="(default 0)")
    text = "one scale: this folder; several: its cfg1.0, cfg1.5, ... (default RUN/samples/cfgS)"
    p.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "png, npz (ADM's layout), both (default), or features alone"
    p.add_argument("--format", default="png,npz", metavar="F[,F]", help=text)
    p.add_argument("--features", metavar="NAME", help="of --format features, as launchers/evaluate.py's (inception)")
    p.add_argument("--inception-weights", type=Path, metavar="PATH", help="as launchers/evaluate.py's")
    p.add_argument("--batch", type=int, default=64, help="images per forward and process (default 64)")
    text = "bf16 is autocast (default: bf16 on CUDA, fp32 on CPU)"
    p.add_argument("--precision", choices=("fp32", "bf16"), help=text)
    text = "torch.compile: a minute or more at the start; the same images but for rounding"
    p.add_argument("--compile", action="store_true", help=text)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    text = "ranks that share the routed experts (default 1)"
    p.add_argument("--expert-parallel", type=int, default=1, metavar="N", help=text)
    p.add_argument("--dry-run", action="store_true", help="check everything, make nothing")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers may add it
    return p


def add_sampler_options(p: argparse.ArgumentParser) -> None:
    """What to solve and how; nothing has a default here, since --protocol may give one."""
    p.add_argument("--steps", type=parse_steps, help="(250); of DDPM also as ADM: 10,15,20 or ddim50")
    p.add_argument("--sampler", metavar="S", help="flow: euler (default), heun, sde; DDPM: ddpm (default), ddim")
    p.add_argument("--eta", type=float, help="noise of ddim: 0 none (default), 1 as ddpm's")
    text = "of a flow's noise levels (default: sample.shift of the run, else as it was trained)"
    p.add_argument("--shift", type=float, metavar="X", help=text)
    forms = ", ".join(get_args(Diffusion))
    p.add_argument("--diffusion", metavar="W", help=f"of sde: {forms} (default sigma)")
    p.add_argument("--diffusion-norm", type=float, metavar="X", help="of sde: scale of W (default 1)")
    p.add_argument("--last-step", metavar="L", help=f"of sde: {', '.join(get_args(LastStep))} (default mean)")
    p.add_argument("--last-step-size", type=float, metavar="X", help="of sde: noise level it begins at (default 0.04)")


def parse_formats(text: str) -> tuple[str, ...]:
    """`png,npz` to its parts; raises `ConfigError`."""
    formats = tuple(sorted(set(text.split(",")), reverse=True))
    if formats != ("features",) and not set(formats) <= {"png", "npz"}:
        reject("--format", repr(text), "is no such format", "write png, npz, png,npz or features")
    return formats


def check(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for numbers out of range, and for options of --format features without it."""
    check_positive(args, "num", "steps", "batch", "expert_parallel")
    if args.expert_parallel > 1:
        check_accelerator()
    if not 0 <= args.seed < 2**64:
        reject("--seed", args.seed, "must lie in [0, 2**64)", "choose such a number")
    unused = {"--features": args.features, "--inception-weights": args.inception_weights}
    for option, value in unused.items() if parse_formats(args.format) != ("features",) else ():
        if value is not None:
            reject(option, value, f"--format {args.format} makes no features", "add --format features, or leave it out")


DEFAULTS = {"num": 64, "labels": "balanced", "steps": 250, "eta": 0.0, "pixels": "adm"}


def parse_interval(text: str) -> Interval:
    """`100,900` to (100.0, 900.0); raises `ConfigError`."""
    try:
        interval = tuple(float(part) for part in text.split(","))
    except ValueError:
        reject("--guidance-interval", repr(text), "is not two numbers", "write for example 100,900")
    check_interval(interval, "--guidance-interval")
    return interval


def said(args: argparse.Namespace) -> dict[str, Any]:
    """The options of drawing that the command line sets, by the names of `Protocol`; raises `ConfigError`."""
    found = {key: getattr(args, key) for key in ("num", "labels", "steps", "sampler", "eta", "shift", "pixels")}
    found["cfg"] = tuple(parse_scales(args.cfg)) if args.cfg is not None else None
    found["channels"] = {None: None, "3": 3, "all": "all"}[args.guidance_channels]
    found["interval"] = parse_interval(args.guidance_interval) if args.guidance_interval is not None else None
    return {key: value for key, value in found.items() if value is not None}


def settle(args: argparse.Namespace, config: Config) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Every option of drawing, and the record of the protocol: what is said, else --protocol's, else the defaults.

    Options of the preset's sampler stay behind where another one is named. Raises `ConfigError`.
    """
    words = said(args)
    protocol = find_protocol(args.protocol, config, words.get("channels")) if args.protocol else None
    preset = {k: v for k, v in vars(protocol).items() if v is not None} if protocol else {}
    if protocol and words.get("sampler", protocol.sampler) != protocol.sampler:
        preset = {k: v for k, v in preset.items() if k not in ("sde", "eta")}
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(SDE)}
    if asked := {key: value for key, value in asked.items() if value is not None}:
        words["sde"] = dataclasses.replace(preset.get("sde", SDE()), **asked)
    return DEFAULTS | preset | words, changes(args.protocol, protocol, words)


def changes(name: str | None, protocol: Protocol | None, words: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the protocol, with those words that differ from it; None without a protocol."""
    if name is None or protocol is None:
        return None
    other = {key: value for key, value in words.items() if value != getattr(protocol, key)}
    if "sde" in other:
        other["sde"] = dataclasses.asdict(other["sde"])
    return protocol_record(name, protocol, {k: list(v) if isinstance(v, tuple) else v for k, v in other.items()})


def choose_hows(args: argparse.Namespace, config: Config, how: dict[str, Any]) -> list[SamplingOptions]:
    """One per guidance scale, checked against the model; raises `ConfigError`."""
    sde = how.get("sde")
    solver, _ = choose_sampler(config, how.get("sampler"), how["steps"], how["eta"], how.get("shift"), sde)
    channels: Channels = how.get("channels", config.guidance.channels)
    check_guidance(config.model, channels, "--guidance-channels")
    trained = config.sample.shift is None and solver.shift == config.diffusion.shift
    options = SamplingOptions(
        cfg=1.0,
        steps=how["steps"],
        seed=args.seed,
        batch=args.batch,
        precision=args.precision,
        sampler=solver.sampler,
        eta=how["eta"],
        channels=channels,
        interval=how.get("interval", config.guidance.interval),
        shift=None if trained else solver.shift,
        sde=solver.sde if solver.sampler == "sde" else None,
        pixels=how["pixels"],
    )
    scales = how.get("cfg", (float(config.sample.cfg),))
    for option in ("guidance_model", "guidance_interval"):
        if (value := getattr(args, option)) not in (None, "none") and max(scales) <= 1:
            way_out = "add --cfg with a scale above 1, or remove it"
            reject(f"--{option.replace('_', '-')}", value, f"guides nothing at scale {max(scales):g}", way_out)
    return [dataclasses.replace(options, cfg=scale) for scale in scales]


def choose_weak(
    args: argparse.Namespace, config: Config, device: Any
) -> tuple[DiT, dict[str, Any]] | tuple[None, None]:
    """The model that guides and its record, where one is named; presets guide by the null label."""
    path, option = args.guidance_model, "--guidance-model"
    if path is None and args.protocol is None:
        path, option = config.guidance.model, "guidance.model of the run"
    if path in (None, "none"):
        return None, None
    model, file, step = load_weak(path, config, device, option)
    return model, sampling.provenance(file, model.config, step, option)


def choose_codec(args: argparse.Namespace, config: Config, weights: Path, device: Any) -> Codec | None:
    """The codec of --vae, or of the run; it must be the one that made the latents the model was trained on."""
    path, option = (args.vae, "--vae") if args.vae else (config.data.vae, "data.vae of the run")
    codec = open_codec(path, device, option) if path else None
    check_channels(config, codec, "--vae")
    found = sampling.codec_of_run(weights)
    if codec is not None and found is not None:
        check_same(found, codec, f"{option}={path}", str(sampling.run_of(weights)))
        codec.follow(found)
    return codec


def choose_pack(
    args: argparse.Namespace, num: int, shape: tuple[int, int, int], device: Any
) -> tuple[str, Callable[[Path], sampling.Pack]] | tuple[None, None]:
    """The extractor's name and the store of features, where --format asks for it; raises `ConfigError`.

    `shape` is (H, W, C) of the pictures that the extractor must take.
    """
    if parse_formats(args.format) != ("features",):
        return None, None
    if num < 2:
        reject("--num", num, "features of one image have no covariance", "choose 2 or more")
    from promoe_ds.evaluation.extractors import load_extractor  # only here sampling needs evaluation
    from promoe_ds.evaluation.feature_store import FeatureStore

    name, weights = args.features or "inception", args.inception_weights
    extractor = load_extractor(name, weights=weights, device=device, batch=args.batch)
    if wanted := extractor.wants(shape):
        conflict = f"takes images of {wanted} (H, W, C), the model makes {list(shape)}"
        reject("--features", extractor.name, conflict, "choose another network, or --format npz")
    extractor.try_out(shape)
    return extractor.name, lambda out: FeatureStore(out, extractor)


def make_jobs(
    args: argparse.Namespace, how: dict[str, Any], protocol: dict[str, Any] | None, config: Config, weights: Path
) -> list[sampling.Job]:
    """One job per scale: straight into --out for one, into subfolders for several."""
    hows = choose_hows(args, config, how)
    base = args.out or (sampling.run_of(weights) or args.run or weights.parent) / "samples"
    split = args.out is None or len(hows) > 1
    formats = parse_formats(args.format)
    folders = [base / f"cfg{options.cfg}" if split else base for options in hows]
    return [
        sampling.Job(out, how["num"], options, how["labels"], formats, protocol)
        for out, options in zip(folders, hows, strict=True)
    ]


def sample(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    check(args)
    said(args)
    ranks = Ranks.from_environment()
    device = ranks.pick_device(args.device)
    args.precision = choose_precision(args.precision, device)
    if args.compile:
        require_compiler(device.type, "--compile", "install g++, name another in CXX, or leave it out")
    weights = find_weights(args.run or args.model, "--run" if args.run else "--model")
    model, config, step = load_ema(weights, "cpu" if args.expert_parallel > 1 else device)
    codec = choose_codec(args, config, weights, device)
    how, protocol = settle(args, config)
    jobs = make_jobs(args, how, protocol, config, weights)
    weak, weak_origin = choose_weak(args, config, device)
    command, origin = shlex.join(["launchers/sample.py", *own_words(argv)]), sampling.provenance(weights, config, step)
    features, pack = choose_pack(args, how["num"], pixel_shape(config, codec), device)
    records = [sampling.record_of(job, origin, config, command, codec, features, weak_origin) for job in jobs]
    for job, record in zip(jobs, records, strict=True):  # all of them before the first image is made
        sampling.check_folder(job.out, record)
    if args.dry_run:
        return
    sampler = sampling.SampleWorker(model, config, device, ranks, codec=codec, pack=pack, weak=weak)
    with connected(sampler, args.expert_parallel) as sampler:
        for drawer in (sampler.model, weak) if args.compile else ():
            if isinstance(drawer, DiT):
                compile_model(drawer, frozen=sampler.device.type == "cpu")
        for job, record in zip(jobs, records, strict=True):
            sampling.run_job(sampler, job, record)
            if ranks.rank == 0:
                forwards = record["forwards_per_image"]
                print(f"{job.num} images at cfg {job.options.cfg} in {job.out}, {forwards} forwards per image")


@contextlib.contextmanager
def connected(sampler: sampling.SampleWorker, ep: int) -> Iterator[sampling.SampleWorker]:
    """Inside, the processes can talk. Groups of `ep` hold one model together; only that needs DeepSpeed."""
    if ep == 1:
        with joined(sampler.ranks):
            yield sampler
        return
    from promoe_ds.parallel import expert_parallel
    from promoe_ds.parallel.topology import Topology

    here = Topology.of(sampler.ranks, ep)
    validate(dataclasses.replace(sampler.config, parallel=ParallelConfig(expert_parallel=ep)))
    if here.world % ep:
        reject("--expert-parallel", ep, f"does not divide the {here.world} processes", "change one of them")
    if here.device.type != sampler.device.type:
        reject("--device", sampler.device, f"experts are shared on {here.device.type} here", "leave --device out")
    with expert_parallel.connected(here):
        model = expert_parallel.share_experts(cast(DiT, sampler.model), here)
        yield dataclasses.replace(sampler, model=model, device=here.device, lockstep=True)


main, console = launcher(sample)

if __name__ == "__main__":
    console()
