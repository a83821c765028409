"""The real trainer at every topology, precision and way to compute; resumed at another one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import topology_invariance
from benchmarks.common import read_log
from promoe_ds.checkpoint import layout
from promoe_ds.data.batches import BatchMaker
from promoe_ds.data.digits import Digits
from promoe_ds.data.order import step_indices
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.ranks import Ranks
from tests.distributed.test_train import losses, losses_so_far, records, state
from tests.launch import CXX, ROOT, run, torchrun


def bad_latent(tree: Path, step: int, row: int) -> Path:
    """A tree of latents for `tiny`; the one in this row of this step is not finite, and its path is returned."""
    config, items = load_config("tiny", []), 100
    bad = step_indices(config.train.seed, step - 1, config.train.global_batch_size, items)[row]
    moments = np.random.default_rng(0).standard_normal((items, 2, 2, 8, 8), dtype=np.float32)
    moments[bad] = np.nan
    paths = [tree / f"{item // 10}/{item:02d}.latent.npz" for item in range(items)]
    for path, (latent, flipped) in zip(paths, moments, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, latent=latent, latent_flip=flipped)
    (tree / "3/._30.latent.npz").write_bytes(b"no latent")
    return paths[bad]


ELASTIC = [  # (world, ep, ZeRO stage) before and after
    ((4, 2, 2), (2, 1, 1)),
    ((4, 2, 2), (4, 4, 2)),
    ((2, 2, 1), (1, 1, 0)),
    ((1, 1, 0), (4, 2, 2)),
    ((4, 2, 3), (2, 2, 3)),
    ((4, 2, 2), (2, 1, 3)),
]


def launch_each(folder: Path, runs: dict[str, tuple[tuple[int, int, int], int]]) -> None:
    """Train to a number of steps at (world, ep, ZeRO stage), run by name; those of one world share a launch."""
    shared = "train.checkpoint_every=5", "optimizer.lr=1e-4"
    for world in {topology[0] for topology, _ in runs.values()}:
        work = [
            (name, f"zero{stage}", f"parallel.expert_parallel={ep}", f"train.steps={steps}", *shared)
            for name, ((size, ep, stage), steps) in runs.items()
            if size == world
        ]
        run(torchrun(world, "tests/distributed/train_worker.py", str(folder), json.dumps(work)))


def test_resume_at_another_topology_continues_the_curve(tmp_path: Path) -> None:
    """Saved at one topology, continued at another, against one run that nothing interrupts.

    Losses agree to 1e-5 relative; every EMA weight to 1e-6 absolute, at the paper's learning rate: Adam's first steps
    are of that size wherever the gradient is mostly rounding, so weights deviate in proportion to it. A moment lost on
    the way would move them by steps of 1e-4.
    """
    launch_each(tmp_path, {"whole": ((4, 2, 2), 10), **{str(before): (before, 5) for before, _ in ELASTIC}})
    for before, after in ELASTIC:
        target = layout.folder(tmp_path / f"{before} -> {after}", 5)
        target.parent.mkdir(parents=True)
        target.symlink_to(layout.folder(tmp_path / str(before), 5))
    launch_each(tmp_path, {f"{before} -> {after}": (after, 10) for before, after in ELASTIC})
    expected = losses(tmp_path / "whole")
    whole = load_file(layout.folder(tmp_path / "whole", 10) / "ema.safetensors")
    for before, after in ELASTIC:
        folder = tmp_path / f"{before} -> {after}"
        curve = losses(tmp_path / str(before)) | losses(folder)
        assert [step for step in losses(folder)] == [6, 7, 8, 9, 10]
        worst = max(abs(curve[step] / expected[step] - 1) for step in range(6, 11))
        ema = load_file(layout.folder(folder, 10) / "ema.safetensors")
        ema_worst = max(float((whole[k] - ema[k]).abs().max()) for k in whole)
        print(f"{before} -> {after}: loss {worst:.1e}, EMA {ema_worst:.1e}")
        assert worst < 1e-5 and ema_worst < 1e-6, (before, after, worst, ema_worst)


def test_topology_invariance(tmp_path: Path) -> None:
    """Every (world, ep, ZeRO stage, micro-batch, accumulation) of the promise, 20 steps in fp32."""
    script = "benchmarks/topology_invariance.py"
    rows = topology_invariance.measure(tmp_path, start=lambda world, words: run(torchrun(world, script, *words)))
    assert len(rows) == len(topology_invariance.CASES)
    log = read_log(tmp_path / topology_invariance.REFERENCE.name)
    golden = json.loads((ROOT / "tests/golden/tiny_losses.json").read_text())
    assert [r["loss"] for r in log] == pytest.approx(golden, rel=1e-3), "training changed: say why, and renew the file"
    for case, deviation in rows.items():
        assert deviation.within(), f"{case.name}: {deviation}"


def test_precisions_and_offload(tmp_path: Path) -> None:
    """bf16 autocast, bf16 with fp32 masters, optimizer offload, activation checkpointing: all near the fp32 curve."""
    cases = {
        "fp32": ("zero1", "train.precision=fp32"),
        "offload": ("zero2_offload", "train.precision=fp32"),
        "offload3": ("zero3_offload", "train.precision=fp32"),
        "checkpointing": ("zero2", "train.precision=fp32", "train.activation_checkpointing=block"),
        "checkpointing3": ("zero3", "train.precision=fp32", "train.activation_checkpointing=block"),
        "selective": ("zero2", "train.precision=fp32", "train.activation_checkpointing=selective"),
        "selective3": ("zero3", "train.precision=fp32", "train.activation_checkpointing=selective"),
        "autocast": ("zero2", "train.precision=bf16_autocast"),
        "autocast0": ("zero0", "train.precision=bf16_autocast"),
        "autocast3": ("zero3", "train.precision=bf16_autocast"),
        "bf16": ("zero1", "train.precision=bf16"),
        "bf16_3": ("zero3", "train.precision=bf16"),
    }
    for bf16 in (False, True):  # DeepSpeed never takes back a process-wide autocast switch: bf16 has its own launch
        work = [(name, *case) for name, case in cases.items() if name.startswith("bf16") == bf16]
        run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
    results = {name: losses(tmp_path / name) for name in cases}
    for name, curve in results.items():
        tolerance = 1e-5 if cases[name][1] == "train.precision=fp32" else 0.06
        for step, loss in results["fp32"].items():
            assert curve[step] == pytest.approx(loss, rel=tolerance), (name, step)
    for name in ("autocast", "bf16"):
        assert results[name] != results["fp32"], name


def test_gradients_that_buckets_cast_are_those_cast_before(tmp_path: Path) -> None:
    """To the bit. Where several add up before, they do so in fp32 as ever."""
    two = "train.micro_batch_size=4"
    cases = {
        "zero1": ("zero1",),
        "zero1, two": ("zero1", two),
        "zero2, two": ("zero2", two, "parallel.expert_parallel=2"),
        "offload": ("zero2_offload",),
        "checkpointing": ("zero2", "train.activation_checkpointing=selective"),
        "zero1, forward twice": ("zero1",),
        "zero2, two, forward twice": ("zero2", two),
    }
    work = json.dumps([(name, *case, "train.precision=bf16_autocast") for name, case in cases.items()])
    for how in ([], ["cast first"]):
        folder = tmp_path / " ".join(how)
        run(torchrun(2, "tests/distributed/train_worker.py", str(folder), *how, work))
    for name in cases:
        late, first = (tmp_path / how / name for how in ("", "cast first"))
        assert losses(late) == losses(first), name
        ema = [load_file(layout.folder(run, 6) / "ema.safetensors") for run in (late, first)]
        assert all(torch.equal(x, ema[1][key]) for key, x in ema[0].items()), name


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_compiled_models_train_alike(tmp_path: Path) -> None:
    """In parts (ep 2) and as whole blocks, whose graph depends on how many of a rank's images have a label."""
    few = ("train.micro_batch_size=2", "train.global_batch_size=4", "diffusion.label_drop=0.6")
    cases = {
        "parts": ("zero2", "train.steps=2", "model.depth=2"),
        "blocks": ("zero2", "train.steps=4", "model.depth=2", "parallel.expert_parallel=1", *few),
    }
    config = load_config("tiny", [*few])
    makers = [BatchMaker(config, Digits(), Ranks(rank, 2)) for rank in (0, 1)]
    labelled = [[int((maker.step(s)[0].label_B < 10).sum()) for maker in makers] for s in range(4)]
    assert labelled == [[1, 0], [2, 2], [1, 0], [0, 2]], "every graph, and ranks that need different ones"
    runs = {name: (*case, "train.precision=fp32") for name, case in cases.items()}
    runs |= {f"{name} compiled": (*case, "train.compile=true") for name, case in runs.items()}
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps([(n, *r) for n, r in runs.items()])))
    for name in cases:
        plain, compiled = (
            [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (name, f"{name} compiled")
        )
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in compiled] == pytest.approx([r[key] for r in plain], rel=1e-5), (name, key)


def test_the_optimizer_in_one_pass_trains_alike(tmp_path: Path) -> None:
    """Clipping too, which DeepSpeed does elsewhere; not compiled here. A resumed run goes on to the bit."""
    few = ("model.depth=2", "train.precision=fp32", "optimizer.clip_grad_norm=0.05")
    stages = {"1": "zero1", "2 offload": "zero2_offload"}
    cases = [(name, ds, *few, "train.steps=4") for name, ds in stages.items()]
    again = [("resumed", "zero1", *few, "train.checkpoint_every=2", f"train.steps={steps}") for steps in (2, 4)]
    again.append(("bf16", "zero1", *few, "train.steps=4", "train.precision=bf16"))
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(cases)))
    work = json.dumps([(f"{name} one", *rest) for name, *rest in cases] + again)
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), "one pass", work))
    for name in stages:
        plain, one = losses(tmp_path / name), losses(tmp_path / f"{name} one")
        assert one == pytest.approx(plain, rel=2e-6), name
        before, after = state(tmp_path / name, 4), state(tmp_path / f"{name} one", 4)
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "1 one")
    whole, parts = state(tmp_path / "1 one", 4), state(tmp_path / "resumed", 4)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "1 one"), rel=0.06)


def test_states_are_read_in_collectives_of_any_size(tmp_path: Path) -> None:
    """Of parameters that are split between ranks, lie on one of them, or are sharded experts."""
    work = [(f"stage {stage}", f"zero{stage}", "model.depth=2", "train.steps=2") for stage in (1, 2)]
    run(torchrun(4, "tests/distributed/train_worker.py", str(tmp_path), "states", json.dumps(work)))


def test_bf16_masters_survive_a_resume(tmp_path: Path) -> None:
    """The fp32 masters, not the bf16 weights, are what a checkpoint restores."""
    shared = ("zero1", "train.precision=bf16", "train.checkpoint_every=4")
    work = [
        ("whole", *shared, "train.steps=8"),
        ("parts", *shared, "train.steps=4"),
        ("parts", *shared, "train.steps=8"),
    ]
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = state(tmp_path / "whole", 8), state(tmp_path / "parts", 8)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    name = "sta/blocks.0.attn.qkv.weight/fp32"
    assert not torch.equal(whole[name], whole[name].bfloat16().float())


def test_losses_and_gradients_that_are_not_finite(tmp_path: Path) -> None:
    """Every rank makes the same decision before any weight is touched; the worst layer is named; a skip is a step."""
    skip = "train.on_nonfinite=skip"
    work = [("stop", "data", "zero2", "train.checkpoint_every=2"), ("stop_gradient", "gradient", "zero3")]
    path = bad_latent(tmp_path / "tree", step=3, row=20)  # of 32: rank 1 has it
    tree = f"data.path={tmp_path}/tree"
    work.append(("stop_latent", "none", "zero1", "data.name=latents", "data.scale=0.18215", tree))
    for what in ("data", "gradient"):
        work += [(f"{what}{stage}", what, f"zero{stage}", skip, "train.checkpoint_every=3") for stage in range(4)]
    for stage in (2, 3):  # from the checkpoint right after the skipped step
        target = layout.folder(tmp_path / f"gradient{stage}_again", 3)
        target.parent.mkdir(parents=True)
        os.symlink(layout.folder(tmp_path / f"gradient{stage}", 3), target)
        work.append((f"gradient{stage}_again", "none", f"zero{stage}", skip))
    done = run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), "bad", json.dumps(work)))
    images = "step 3, rank 1: loss/diffusion is nan; first seen in the images on rank 1"
    weight = "step 3: the gradient norm is inf; outputs are finite; most of it is in the gradient of "
    assert f"stop: {images}; the last checkpoint is unharmed\n" in done.stdout
    assert f"stop_latent: {images}: {path}; there is no checkpoint yet\n" in done.stdout
    assert done.stdout.count(f"data.path={tmp_path}/tree: 1 name is left out: hidden, or links to") == 1
    assert (
        f"stop_gradient: {weight}blocks.2.attn.proj.weight (1024 of 1024 values on rank 1); there is no" in done.stdout
    )
    assert losses_so_far(tmp_path / "stop") == losses_so_far(tmp_path / "stop_gradient") == [1, 2]
    (saved,) = layout.candidates(tmp_path / "stop")  # still being written when the step failed
    assert layout.step_of(saved) == 2 and layout.damage(saved) is None
    for what, words in (("data", images), ("gradient", weight)):
        logs = {f"{what}{s}": records(tmp_path / f"{what}{s}") for s in range(4)}
        for name, log in logs.items():
            assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6], name
            assert [("skipped" in r) for r in log] == [False, False, True, False, False, False], name
            assert log[2]["skipped"].startswith(words) and log[2]["grad_norm"] is None
            pairs = [(r["loss"], r0["loss"]) for r, r0 in zip(log, logs[f"{what}0"], strict=True)]
            assert (pairs[2] == (None, None)) == (what == "data"), "JSON knows no NaN"
            assert all(a == pytest.approx(b, rel=1e-5) for a, b in pairs if b is not None), name
    for stage in (2, 3):
        whole, again = (losses(tmp_path / f"gradient{stage}{end}") for end in ("", "_again"))
        assert list(again) == [4, 5, 6] and all(again[s] == whole[s] for s in again), "Adam counts the step"
