#!/usr/bin/env python
"""What becomes of a trained dense model that is upcycled to experts: its loss before, at once, and after more steps.

examples:
  python benchmarks/upcycling.py                                   two seeds, some 12 minutes on one idle CPU core
  python benchmarks/upcycling.py --steps 500 --more 500 --seeds 0

A dense digits model is trained; from its weights start the dense model again and ProMoE, each with a new optimizer,
beside a ProMoE without weights. The same command goes on where it was. exit codes: 0 done, 2 a mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launchers.train import prepare_environment  # noqa: E402

if __name__ == "__main__":
    prepare_environment()

from benchmarks.common import facts, integers, load_points, page, save_point, table  # noqa: E402
from benchmarks.paper_tables import done_steps, train_until  # noqa: E402
from benchmarks.scoring import ema_loss  # noqa: E402
from promoe_ds.checkpoint.init_from import InitialWeights  # noqa: E402
from promoe_ds.checkpoint.resume import load_weights  # noqa: E402
from promoe_ds.config.errors import reject  # noqa: E402
from promoe_ds.config.schema import Config  # noqa: E402
from promoe_ds.data import build_dataset  # noqa: E402
from promoe_ds.formats.weights import load  # noqa: E402
from promoe_ds.models.dit import DiT  # noqa: E402
from promoe_ds.models.init import build, materialize  # noqa: E402
from promoe_ds.moe.router import Router, Routing  # noqa: E402
from promoe_ds.recipes.load import load_config  # noqa: E402
from promoe_ds.utils.command_line import Parser, guarded  # noqa: E402
from promoe_ds.utils.files import write_text  # noqa: E402

ANEW = "train.init_reset=[experts]"
ROWS = {
    "dense, trained on": ("digits_dense", ("train.init={dense}",)),
    "upcycled to ProMoE": ("digits", ("train.init={dense}", ANEW)),
    "ProMoE from scratch": ("digits", ()),
}
"""name -> (recipe, overrides)"""
AT_ONCE = {
    "upcycled to ProMoE, gates of 1": ("digits", ("train.init={dense}", ANEW)),
    "upcycled to k-means": ("digits_kmeans", ("train.init={dense}", ANEW)),
}
"""what is not trained"""
FRACTIONS = (0, 0.05, 0.2, 0.5, 1)
"""of the further steps, at which the loss is measured"""
DRAWS = 1797
"""images of the loss: every digit, with a noise and timestep of its own"""
NOTE = """A dense digits model (1.27 M parameters) is trained for {steps} steps of 128 images. From its EMA weights
start the same model and ProMoE, each with a new optimizer; beside them a ProMoE from scratch. Loss: `loss/diffusion` of
the raw weights on {draws} labelled images, with the same noise and timesteps for all; mean of seeds {seeds} (lowest to
highest). Not trained: the upcycled ProMoE with its gate weights replaced by 1, which is the dense model by
construction, and a mixture routed by k-means, whose gate weights are 1."""


def trained(config: Config, run: Path, step: int) -> DiT:
    """The raw weights of a run at a step, training up to it first; at step 0, what it starts from."""
    model = materialize(build(config), config.train.seed)
    if step == 0:
        if config.train.init:
            load_weights(InitialWeights(config), model, lambda p, full: full)
        return model.eval()
    if done_steps(run) < step and train_until(config, run, step):
        raise KeyboardInterrupt  # a signal
    if done_steps(run) != step:
        reject("--runs", run, f"is beyond step {step}", "remove the folder")
    model.load_state_dict(load(run, "raw").tensors)
    return model.eval()


def with_gates_of_one(model: DiT) -> DiT:
    def replaced(module: torch.nn.Module, args: object, routing: Routing) -> Routing:
        return routing._replace(weight_N=torch.ones_like(routing.weight_N))

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(replaced)
    return model


def points(more: int) -> list[int]:
    return [round(more * fraction) for fraction in FRACTIONS]


def measure(args: argparse.Namespace, seed: int) -> None:
    """The loss of every row at each of the points; each is kept in a file of its own, and not measured again."""
    dense = load_config("digits_dense", [f"train.steps={args.steps}", f"train.seed={seed}"])
    source, data, device = args.runs / f"dense_{args.steps}_seed{seed}", build_dataset(dense), torch.device("cpu")
    if done_steps(source) < args.steps:
        trained(dense, source, args.steps)

    for name, (recipe, overrides) in (ROWS | AT_ONCE).items():
        chosen = [f"train.steps={args.more}", f"train.seed={seed + 100}", "train.log_every=25"]
        config = load_config(recipe, [*chosen, *(text.format(dense=source) for text in overrides)])
        for step in points(args.more) if name in ROWS else [0]:
            if key(args, name, seed, step) in load_points(args.runs / "points"):
                continue
            model = trained(config, args.runs / key(args, name, seed), step)
            model = with_gates_of_one(model) if "gates of 1" in name else model
            loss = ema_loss(model, config, data, DRAWS, 512, device)
            save_point(args.runs / "points", key(args, name, seed, step), {"loss": loss} | facts())
            print(f"seed {seed}: {name}, step {step}: {loss:.4f}", flush=True)


def key(args: argparse.Namespace, name: str, seed: int, step: int | None = None) -> str:
    """Of a point, or of the run that it is measured on."""
    point = "" if step is None else f"_step{step}"
    return f"{name.replace(' ', '_')}_{args.steps}_{args.more}_seed{seed}{point}"


def run(words: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the dense model (500)")
    parser.add_argument("--more", type=int, default=500, help="after that (500)")
    parser.add_argument("--seeds", type=lambda text: integers(text, 0), default=[0, 1], metavar="0,1")
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/upcycling.md", metavar="FILE")
    args = parser.parse_args(words)
    for seed in args.seeds:
        measure(args, seed)
    kept, steps = load_points(args.runs / "points"), points(args.more)

    def cell(name: str, step: int) -> str:
        found = [kept[k]["loss"] for seed in args.seeds if (k := key(args, name, seed, step)) in kept]
        spread = f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
        return f"{mean(found):.4f}{spread}" if found else ""

    rows = [(name, *(cell(name, step) for step in steps)) for name in (*ROWS, *AT_ONCE)]
    note = NOTE.format(steps=args.steps, draws=f"{DRAWS:,}", seeds=", ".join(map(str, args.seeds)))
    columns = ["row", *(f"after {step:,} steps" if step else "at once" for step in steps)]
    made = [{name: point[name] for name in facts()} for point in kept.values()]
    text = page("Upcycling on digits", "benchmarks/upcycling.py", words, note, table(columns, rows), measured=made)
    write_text(args.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
