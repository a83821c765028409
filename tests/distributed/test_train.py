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

from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.checkpoint import layout
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


def test_kill_9_of_all_ranks_then_the_run_goes_on_bit_exact(uninterrupted: Path, tmp_path: Path) -> None:
    words = (*ZERO2_EP2, "--run", str(tmp_path / "run"), *STEPS)
    command = deepspeed(2, "launchers/train.py", *words)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, text=True)
    wait_for_step(tmp_path / "run", 27, process)
    wait_for_checkpoint(tmp_path / "run", process)  # written behind the steps that follow its own
    kill(process)
    assert layout.step_of(layout.candidates(tmp_path / "run")[-1]) == 20
    resumed = train(*words, processes=2)
    assert "resuming at step 20 of 60" in resumed.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted)
    whole, again = state(uninterrupted, 60), state(tmp_path / "run", 60)
    assert whole.keys() == again.keys() and len(whole) > 250
    assert all(torch.equal(whole[key], again[key]) for key in whole)


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


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_one_line_says_that_this_torch_was_never_compiled_with(tmp_path: Path) -> None:
    done = run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), "untested torch"))
    minor = ".".join(torch.__version__.split(".")[:2])
    assert (done.stdout + done.stderr).count(f"train.compile was never tested on torch {minor}, but on 1.13: ") == 1


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
