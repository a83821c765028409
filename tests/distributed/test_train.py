"""The real trainer through the real launchers: interrupted and resumed, at other topologies, at other precisions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import topology_invariance
from benchmarks.common import read_log
from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.checkpoint import layout
from promoe_ds.data.batches import BatchMaker
from promoe_ds.data.digits import Digits
from promoe_ds.data.order import step_indices
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.ranks import Ranks
from tests.launch import CXX, ENVIRONMENT, ROOT, deepspeed, kill, run, torchrun, train

ZERO2_EP2 = ("--config", "tiny", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "parallel.expert_parallel=2")
STEPS = ("train.steps=60", "train.checkpoint_every=20")


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moments and EMA."""
    where = layout.folder(folder, step)
    return {f"{f.name[:3]}/{k}": v for f in sorted(where.glob("*.safetensors")) for k, v in load_file(f).items()}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    last = lambda: max(losses_so_far(folder), default=0)  # noqa: E731
    wait_until(lambda: last() >= step or process.poll() is not None, last)
    assert process.poll() is None, f"ended early with {process.returncode}"


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: layout.candidates(folder) or process.poll() is not None, lambda: losses_so_far(folder))
    assert process.poll() is None, f"ended early with {process.returncode}"


def losses_so_far(folder: Path) -> list[int]:
    log = folder / "metrics.jsonl"
    return [json.loads(t)["step"] for t in log.read_text().splitlines() if t.endswith("}")] if log.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*ZERO2_EP2, "--run", str(folder), *STEPS, processes=2)
    return folder


def test_run_folder_holds_what_other_programs_rely_on(uninterrupted: Path) -> None:
    assert {"config.yaml", "ds_config.json", "metrics.jsonl", "checkpoints", "samples"} <= set(
        os.listdir(uninterrupted)
    )
    assert (uninterrupted / "samples" / "grid.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 61))
    wanted = "loss loss/diffusion loss/routing_contrastive grad_norm images_per_s mfu memory_gib"
    assert {*wanted.split(), "load_max_over_mean", "dead_experts", "step"} <= records[-1].keys()
    assert records[-1]["loss"] < records[0]["loss"]
    kept = [layout.step_of(p) for p in layout.candidates(uninterrupted)]
    assert kept == [40, 60]
    assert not list((uninterrupted / "checkpoints").glob("tmp_*"))


def test_kill_9_of_all_ranks_then_the_same_command_is_bit_exact(uninterrupted: Path, tmp_path: Path) -> None:
    command = deepspeed(2, "launchers/train.py", *ZERO2_EP2, "--run", str(tmp_path / "run"), *STEPS)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, text=True)
    wait_for_step(tmp_path / "run", 27, process)
    wait_for_checkpoint(tmp_path / "run", process)  # written behind the steps that follow its own
    kill(process)
    assert layout.step_of(layout.candidates(tmp_path / "run")[-1]) == 20
    resumed = run(command)
    assert "resuming at step 20 of 60" in resumed.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted)
    whole, again = state(uninterrupted, 60), state(tmp_path / "run", 60)
    assert whole.keys() == again.keys() and len(whole) > 250
    assert all(torch.equal(whole[key], again[key]) for key in whole)


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


def test_stops_of_the_process_group_of_the_deepspeed_launcher(uninterrupted: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM by a scheduler. Ranks get it twice (the launcher passes on): they save once, and no step is
    lost."""
    folder = tmp_path / "run"
    command = deepspeed(2, "launchers/train.py", *ZERO2_EP2, "--run", str(folder), *STEPS)
    for number, step in ((signal.SIGINT, 8), (signal.SIGTERM, 25)):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
        )
        wait_for_step(folder, step, process)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=PATIENCE)  # ends when the last rank closes the pipe
        assert "stopped by a signal at step" in out and process.returncode == -number
        assert step <= layout.step_of(layout.candidates(folder)[-1]) < 60
        assert number.name in (folder / "requeue").read_text()
    train(*ZERO2_EP2, "--run", str(folder), *STEPS, processes=2)
    assert losses(folder) == losses(uninterrupted)


def test_sigterm_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """And a single process ends with 85."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        arguments = ("--config", "tiny", "--run", str(folder), "train.steps=100000", "train.log_every=1")
        command = [sys.executable, str(ROOT / "launchers/train.py"), *arguments]
        if world == 2:
            command = torchrun(2, "launchers/train.py", *arguments, "parallel.expert_parallel=2")
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        wait_for_step(folder, 3, process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]) if world == 2 else process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
        assert "stopped by a signal at step" in out
        assert process.returncode == (85 if world == 1 else 1), "torchrun makes every failure 1"
        (saved,) = layout.candidates(folder)
        assert layout.damage(saved) is None and max(losses(folder)) == layout.step_of(saved)


def test_a_damaged_image_that_one_rank_reads_is_named(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((8, 8), 20 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    victim = tmp_path / "data" / "dog" / "2.png"
    victim.write_bytes(victim.read_bytes()[:40])
    images = ("data.name=images", f"data.path={tmp_path / 'data'}", "model.num_classes=2", "train.global_batch_size=2")
    done = train("--config", "tiny", "--run", str(tmp_path / "run"), *images, processes=2, check=False, fork=True)
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert done.returncode != 0 and str(victim) in line and line.startswith("error: rank ")


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


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_one_line_says_that_this_torch_was_never_compiled_with(tmp_path: Path) -> None:
    done = run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), "untested torch"))
    minor = ".".join(torch.__version__.split(".")[:2])
    assert (done.stdout + done.stderr).count(f"train.compile was never tested on torch {minor}, but on 1.13: ") == 1


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


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
