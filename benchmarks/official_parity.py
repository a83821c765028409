#!/usr/bin/env python
"""The official ProMoE code against this project: outputs, gradients and training steps, for every family it has.

    git clone https://github.com/ali-vilab/ProMoE ../ProMoE
    python benchmarks/official_parity.py --official ../ProMoE [--steps 30] [--out benchmarks/results/official_parity.md]

For each family a small model of the official code is filled with drawn weights and saved as that code saves it.
`formats.importing` reads the file. Then the same noisy images go through both models, and both train: the official
model in one process, by the loop of its train.py written anew (clipping, AdamW, auxiliary losses); ours through the
real trainer, at each (world, ep, stage). Both get the same images, noise, timesteps and labels. fp32 on the CPU.

Exit code 1 if a loss deviates by more than 1e-5. What is compared, and what differs on purpose: docs/fidelity.md.
With --golden FILE the official losses of 6 steps are kept, for tests/distributed/test_official_parity.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import facts, page, read_log, table  # noqa: E402
from benchmarks.official_model import (  # noqa: E402
    CHANNELS,
    CLIP,
    FAMILIES,
    LR,
    State,
    drawn,
    imported,
    losses,
    noisy,
    official_model,
    shapes_of,
    train_official,
    training,
    write_pack,
)

TOLERANCE = 1e-5
"""of losses, relative"""
TOPOLOGIES = ((1, 1, 1), (2, 2, 2), (4, 2, 1))
"""(world, ep, ZeRO stage)"""


def official_gradients(model: Any, config: Any) -> tuple[Tensor, State]:
    """Of the first batch: the output in eval mode, and the gradients by official name."""
    from promoe_ds.data import build_dataset
    from promoe_ds.data.batches import BatchMaker

    (batch,) = BatchMaker(config, build_dataset(config)).step(0)
    x, t, label, target = noisy(batch)
    with torch.no_grad():
        shown = model.eval()(x, t, context=label)
    shown = shown[0] if isinstance(shown, tuple) else shown
    model.train()
    _, total = losses(model, x, t, label, target)
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return shown, grads


def our_gradients(folder: Path, config: Any) -> tuple[Tensor, State]:
    """The same of the imported model; gradients in the official layout."""
    from promoe_ds.checkpoint.load_weights import load_ema
    from promoe_ds.data import build_dataset
    from promoe_ds.data.batches import BatchMaker
    from promoe_ds.diffusion.objective import make_objective
    from promoe_ds.formats.official import to_official
    from promoe_ds.moe.router import ROUTERS
    from promoe_ds.train.loss import total_loss

    (batch,) = BatchMaker(config, build_dataset(config)).step(0)
    model, _, _ = load_ema(folder)
    x, t, label, _ = noisy(batch)
    shown = model(x, t, label).prediction
    model.train().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    weights = ROUTERS[config.moe.router.name].aux_loss_weights(config.moe.router) if config.moe else {}
    output, terms = make_objective(config.diffusion).loss(
        lambda x, t: model(x, t, batch.label_B, batch.rows), batch.x_BCHW, batch.noise_BCHW, batch.gauss_B
    )
    total_loss(terms, output, weights)[0].backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    grads |= {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    return shown, to_official(grads, config)


def without_key_bias(grads: State) -> State:
    """Its gradient is 0 but for rounding (docs/fidelity.md)."""
    out = dict(grads)
    for name in out:
        if name.endswith("attn.qkv.bias"):
            q, _, v = out[name].chunk(3)
            out[name] = torch.cat([q, v])
    return out


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def compare_once(official: Path, family: str, folder: Path, config: Any, state: State) -> dict[str, float]:
    """Largest deviations over the largest value: outputs in eval mode, and the gradient of any parameter."""
    model = official_model(official, family)
    model.load_state_dict(state)
    shown, grads = official_gradients(model, config)
    ours, our_grads = our_gradients(folder, config)
    theirs, mine = without_key_bias(grads), without_key_bias(our_grads)
    worst = max(relative(mine[name], grad) for name, grad in theirs.items() if grad.abs().max() > 0)
    return {"output": relative(ours[:, :CHANNELS], shown[:, :CHANNELS]), "gradient": worst}


def degree(family: str, ep: int) -> int:
    """A dense model has no experts to shard."""
    return 1 if family == "dense" else ep


def train_ours(work: Path, steps: int, ep: int, stage: int) -> None:
    """In every process of a launch: train each imported family with the real trainer."""
    from promoe_ds.parallel import ds_config, topology
    from promoe_ds.train.trainer import Trainer
    from promoe_ds.utils.ranks import Ranks

    ranks = Ranks.from_environment()
    for family in FAMILIES:
        here = degree(family, ep)
        config = training(work / family, work / "pack.npz", steps, here)
        run = work / f"{family}-{ranks.world}-{ep}-{stage}"
        trainer = Trainer(
            config, ds_config.resolve(f"zero{stage}", config, ranks.world), run, topology.Topology.of(ranks, here)
        )
        assert trainer.run() == 0
        trainer.close()
    topology.disconnect()
    topology.leave(0)


def launch(work: Path, steps: int, world: int, ep: int, stage: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--",
               str(Path(__file__).resolve()), "--worker", str(work), "--steps", str(steps),
               "--topology", f"{ep},{stage}"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def deviation(ours: list[dict[str, Any]], theirs: list[dict[str, float]], key: str) -> float:
    return max(abs(a[key] / b[key] - 1) for a, b in zip(ours, theirs, strict=True))


def prepare(official: Path, work: Path) -> dict[str, State]:
    """The pack, and for each family a checkpoint written by the official model, imported; returns their states."""
    write_pack(work / "pack.npz")
    states = {}
    for family in FAMILIES:
        model = official_model(official, family)
        model.load_state_dict(drawn(shapes_of(family)))
        states[family] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        checkpoint = work / f"{family}.pth"
        torch.save({"step": 0, "model_state_dict": model.state_dict(), "ema_model_state_dict": model.state_dict()},
                   checkpoint)  # fmt: skip
        imported(family, checkpoint, work / family)
    return states


def compare(official: Path, work: Path, steps: int) -> tuple[list[list[str]], bool]:
    """The rows of the table, and whether every loss is within `TOLERANCE`."""
    states, rows, good = prepare(official, work), [], True
    theirs, once = {}, {}
    for family, state in states.items():
        config = training(work / family, work / "pack.npz", steps)
        once[family] = compare_once(official, family, work / family, config, state)
        model = official_model(official, family)
        model.load_state_dict(state)
        theirs[family] = train_official(model, config, steps)
    for world, ep, stage in TOPOLOGIES:
        launch(work, steps, world, ep, stage)
        for family in FAMILIES:
            log = read_log(work / f"{family}-{world}-{ep}-{stage}")
            loss = deviation(log, theirs[family], "loss/diffusion")
            norm = deviation(log, theirs[family], "grad_norm")
            good &= loss <= TOLERANCE
            first = [f"{once[family][key]:.1e}" for key in ("output", "gradient")]
            last = f"{theirs[family][0]['loss/diffusion']:.4f} to {theirs[family][-1]['loss/diffusion']:.4f}"
            rows.append(
                [family, f"({world}, {degree(family, ep)}, {stage})", *first, last, f"{loss:.1e}", f"{norm:.1e}"]
            )
    return rows, good


def keep_golden(official: Path, work: Path, file: Path, steps: int = 6) -> None:
    """The official losses and gradient norms, for a test without the official code."""
    golden = {}
    for family, state in prepare(official, work).items():
        model = official_model(official, family)
        model.load_state_dict(state)
        golden[family] = train_official(model, training(work / family, work / "pack.npz", steps), steps)
    file.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="DIR", help="a clone of the official code")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--golden", type=Path, metavar="FILE", help="keep the official losses of 6 steps instead")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--topology", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train_ours(args.worker, args.steps, *map(int, args.topology.split(",")))
        return 0
    if args.official is None or not (args.official / "models" / "models_ProMoE_TC.py").is_file():
        parser.error(
            f"--official={args.official}: no models/models_ProMoE_TC.py there; name a clone of ali-vilab/ProMoE"
        )
    torch.set_num_threads(1)
    store = torch.distributed.HashStore()  # the official DiffMoE always reduces its thresholds over ranks
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as work:
        if args.golden:
            keep_golden(args.official.resolve(), Path(work), args.golden)
            return 0
        rows, good = compare(args.official.resolve(), Path(work), args.steps)
    commit = subprocess.run(["git", "-C", str(args.official), "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()  # fmt: skip
    columns = ["family", "(world, ep, stage)", "output", "gradient", "official loss", "loss", "gradient norm"]
    text = page(
        f"The official code and this project: {args.steps} steps", "benchmarks/official_parity.py",
        ["--official", "ProMoE", "--steps", str(args.steps)],
        f"Official code: ali-vilab/ProMoE{f' at {commit}' if commit else ''}. Largest relative deviations: of outputs "
        "(eval mode) and of any parameter's gradient on the first batch, each over its largest value; of the velocity "
        f"loss and the gradient norm over {args.steps} steps at AdamW's rate {LR:g}, clipped at {CLIP:g}. "
        "What is compared, and what differs on purpose: [fidelity.md](../../docs/fidelity.md).",
        table(columns, rows), measured=[facts()],
    )  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
