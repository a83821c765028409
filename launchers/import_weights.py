#!/usr/bin/env python
"""Read a published checkpoint (ProMoE, DiffMoE, DiT, SiT, REPA, diffusers) into a folder to sample or to fine-tune."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C while libraries load

from promoe_ds.checkpoint.layout import bytes_of, size
from promoe_ds.costs.flops import count_parameters
from promoe_ds.formats.importing import import_checkpoint
from promoe_ds.formats.official import CONVENTIONS, FAMILIES
from promoe_ds.formats.weights import write
from promoe_ds.utils.command_line import Parser, launcher
from promoe_ds.utils.outputs import check_new

EXAMPLES = """examples:
  python launchers/import_weights.py ckpt_step_500000.pth --out promoe_b          ProMoE, Dense, TC-, EC-DiT or DiffMoE
  python launchers/import_weights.py ckpt_step_500000.pth --out promoe_ec_l --family promoe_ec
  python launchers/import_weights.py DiT-XL-2-256x256.pt --out dit_xl --convention ddpm
  python launchers/import_weights.py SiT-XL-2-256x256.pt --out sit_xl --convention sit
  python launchers/import_weights.py 0400000.pt --out repa_xl --convention repa       REPA: projectors are left out
  python launchers/import_weights.py DiT-XL-2-256/transformer --out dit_xl            a folder that diffusers wrote
  python launchers/import_weights.py last.ckpt --out x --convention repa --weights raw --drop 'net.logvar*'   Lightning
  python launchers/import_weights.py ckpt.pth --out x --dry-run model.heads=8 moe.router.top_k=3    what weights hide

then
  python launchers/sample.py --model promoe_b --vae sd-vae-ft-mse --num 16
  deepspeed launchers/train.py --config promoe_b/config.yaml train.init=promoe_b data.path=latents --run runs/tuned

Every key is accounted for: one that is missing, unexpected or of another shape is named, and nothing is written. The
file loads without running code. Nothing is overwritten. Exit codes: 0 done, 2 user error.
"""


def parser() -> Parser:
    p = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "a .pth, .pt, .ckpt or .safetensors file, or a folder that diffusers wrote"
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=kinds)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which of a file that holds both (ema)")
    p.add_argument("--family", choices=FAMILIES, help="(default: as the keys say; promoe_ec has the keys of promoe)")
    choices = "; ".join(f"{name}: {how.who}" for name, how in CONVENTIONS.items())
    p.add_argument("--convention", choices=tuple(CONVENTIONS), help=f"{choices} (default: promoe for its own files)")
    p.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="names to leave out, 'heads.*'")
    p.add_argument("--ema-std", type=float, metavar="STD", help="which average, where edm2's code kept several")
    p.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="what the weights do not tell")
    return p


def bring(argv: list[str]) -> None:
    args = parser().parse_intermixed_args(argv)
    check_new(args.out, "name another folder")
    made = import_checkpoint(
        args.checkpoint, args.weights, args.family, args.convention, args.overrides, args.drop, args.ema_std
    )
    m, moe, count = made.config.model, made.config.moe, count_parameters(made.config)
    experts = f"{moe.num_experts} experts, router {moe.router.name}" if moe else "dense"
    print(f"{made.config.name}: depth {m.depth}, width {m.width}, {m.heads} heads, {experts}, step {made.step:,}")
    print(f"{count.total:,} parameters, every key accounted for; {made.config.diffusion.name}, time {m.time}")
    for note in made.notes:
        print(note)
    if not args.dry_run:
        print(
            f"{write(made, args.out)}: {size(bytes_of(args.out))}; launchers/sample.py --model {args.out} draws from it"
        )


main, console = launcher(bring)

if __name__ == "__main__":
    console()
