"""`make bench-gpu` dry, as a machine has it that holds torch, numpy, pyyaml and safetensors alone; and what it must not
lose: figures to a kill, a broken device, a wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, moe_peers, throughput
from benchmarks.gpu import cifar, engine, figures, smoke, speed, stages, tables, visit
from benchmarks.interleaved import interleaved
from benchmarks.op_counting import tells_of_a_sync
from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.utils.command_line import guarded
from tests.launch import ENVIRONMENT, ROOT

CPU = torch.device("cpu")
BARE = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *of: None if name.partition(".")[0] in %r else real(name, *of)
)
"""
ABSENT = ("PIL", "deepspeed", "diffusers", "matplotlib", "pyarrow", "pydantic", "scipy", "sklearn", "tqdm")


def dry(folder: Path) -> figures.Stage:
    return figures.Stage("smoke", folder, dry=True)


@pytest.mark.slow
def test_the_whole_visit_with_four_packages(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(BARE % (ABSENT,))
    path = os.pathsep.join([str(tmp_path / "bare"), str(ROOT)])
    env = ENVIRONMENT | {"PYTHONPATH": path, "OUT": str(tmp_path / "out"), "DRY": "1"}
    words = ["make", "-C", str(ROOT), "bench-gpu", f"BENCH_PYTHON={sys.executable}"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = figures.read(tmp_path / "out")
    assert {f["stage"] for f in found} == set(stages.STAGES)
    skipped = "not installed"
    for f in found:
        assert "failed" not in f and f.get("ok", True) and (f["stage"] != "engine" or skipped in f["skipped"]), f
    page = (tmp_path / "out/page.md").read_text()
    assert page in done.stdout and "## Faults\n\nNone." in page
    assert "| promoe_s | 2 | plain |" in page and not list((tmp_path / "out").glob("*.now"))
    assert {path.name for path in (tmp_path / "out").glob("kernels_*")} == {"kernels_promoe_s_plain.txt"}


@pytest.mark.slow
def test_a_visit_that_is_told_to_end_leaves_its_page(tmp_path: Path) -> None:
    """As `timeout` does it: SIGTERM to make and what it started, but for the stages, which have their own sessions."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path), "--stages", "ceilings,speed"]
    visiting = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for _ in range(3000):
        if (tmp_path / "speed.now").exists() or visiting.poll() is not None:
            break
        time.sleep(0.1)
    visiting.send_signal(signal.SIGTERM)
    out, _ = visiting.communicate(timeout=60)
    assert visiting.returncode == 128 + signal.SIGTERM
    found = figures.read(tmp_path)
    assert found and (tmp_path / "page.md").read_text() == tables.page(found) and "copy" in out
    stages_left = subprocess.run(["pgrep", "-f", f"gpu.stages .*--out {tmp_path}"], capture_output=True, text=True)
    assert not stages_left.stdout


@pytest.mark.slow
def test_training_through_deepspeed_gives_the_golden_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stage = figures.Stage("engine", tmp_path, dry=True)
    stage.measure("zero1", lambda: engine.losses(stage, "zero1", "fp32"))
    stage.measure("nothing", lambda: engine.losses(stage, "zero9", "fp32"))
    right, wrong = figures.read(tmp_path)
    assert right["ok"] and right["furthest"] < 1e-3
    assert "exit 2" in wrong["failed"] and "zero9" in wrong["failed"]


@pytest.mark.slow
def test_cifar_is_stopped_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over when it has made some steps, however long the machine takes for them."""
    log, waited = tmp_path / "dense.log", cifar.waited

    def until_it_trains(process: subprocess.Popen[bytes], seconds: float) -> int | None:
        if seconds == cifar.SAVE_SECONDS:
            return waited(process, PATIENCE)
        assert seconds == 20
        wait_until(lambda: "step 20/" in log.read_text() or process.poll() is not None)
        return process.poll()

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cifar, "MODELS", {"dense": ["moe=null"]})
    monkeypatch.setattr(cifar, "waited", until_it_trains)
    assert guarded(cifar.run, ["--dry", "--each", "20", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "cifar.md").read_text()
    assert "| saved |" in text, (tmp_path / "dense.log").read_text()
    assert (tmp_path / "dense_metrics.jsonl").exists()


def test_a_figure_survives_a_kill_and_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []
    stage = dry(tmp_path)
    stage.measure("one", lambda: calls.append("one") or {"ms": 1.23456789, "ok": True})
    with (tmp_path / figures.FILE).open("a") as file:
        file.write('{"stage": "smoke", "name": "tw')  # killed while it wrote
    again = dry(tmp_path)
    again.measure("one", lambda: calls.append("again") or {})
    again.measure("two", lambda: {"ms": 2.0})
    assert calls == ["one"] and [f["name"] for f in figures.read(tmp_path)] == ["one", "two"]
    assert figures.read(tmp_path)[0]["ms"] == 1.23457


def test_figures_of_another_card_do_not_count(tmp_path: Path) -> None:
    figures.append(tmp_path, {"stage": "smoke", "name": "one", "device": "NVIDIA H100", "ok": True})
    dry(tmp_path).measure("one", lambda: {"ok": True})
    assert [f["device"] for f in figures.read(tmp_path)] == ["NVIDIA H100", "cpu"]


def test_any_failure_is_a_figure_and_a_broken_device_ends_the_process(tmp_path: Path) -> None:
    def fail(error: Exception) -> Any:
        raise error

    stage = dry(tmp_path)
    for error in (ValueError("no\nsuch | kernel"), torch.OutOfMemoryError("CUDA error: out of memory")):
        stage.measure(type(error).__name__, lambda error=error: fail(error))
    with pytest.raises(SystemExit) as ended:
        stage.measure("asserted", lambda: fail(RuntimeError("CUDA error: device-side assert triggered")))
    assert ended.value.code == figures.BROKEN
    failed = [f["failed"] for f in figures.read(tmp_path)]
    assert failed[:2] == ["ValueError: no such / kernel", "out of memory"] and "device-side assert" in failed[2]
    late = figures.Stage("smoke", tmp_path, dry=True, seconds=-1)
    late.measure("late", lambda: {"ok": True})
    assert figures.read(tmp_path)[-1]["failed"] == figures.NO_TIME
    visit.forget_failures(tmp_path)
    assert figures.read(tmp_path) == [], "a new visit tries them again"


@pytest.mark.slow
def test_a_stage_that_hangs_or_dies_costs_one_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "stage.py"
    program.write_text(
        "import os, sys, time\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[3])\n"
        "from benchmarks.gpu.figures import Stage\nstage = Stage(sys.argv[1], Path(sys.argv[2]), dry=True)\n"
        "stage.measure('first', lambda: {'ok': True})\n"
        "stage.measure('dies', lambda: os.kill(os.getpid(), 9))\n"
        "stage.measure('hangs', lambda: time.sleep(1000))\n"
    )

    def begin(self: visit.Visit, name: str, seconds: float) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(program), name, str(self.folder), str(ROOT)]
        return subprocess.Popen(words, start_new_session=True)

    monkeypatch.setattr(visit.Visit, "begin_stage", begin)
    monkeypatch.setattr(visit, "STAGES", {"smoke": stages.Times("smoke", "run", 25.0)})
    going = visit.Visit(tmp_path, dry=True, seconds=40.0)
    going.run(["smoke"])
    first, died, hung = figures.read(tmp_path)
    assert first["ok"] and died["name"] == "dies" and died["failed"] == "the process died with -9"
    assert hung["name"] == "hangs" and hung["failed"] == "stopped, its stage was late"


def test_the_stages_fit_into_the_time() -> None:
    alone = sum(times.seconds for times in stages.STAGES.values() if times.beside is None)
    assert alone + visit.LAST_WORDS <= visit.SECONDS
    for times in stages.STAGES.values():
        assert times.beside is None or times.seconds <= stages.STAGES[times.beside].seconds
    assert speed.POINTS[0] == ("promoe_xl", 64, "plain") and len(set(speed.POINTS)) == len(speed.POINTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stages smoke,x", "--stages=x: is no stage; choose of ceilings,warm,engine,smoke,speed,profile,layer"),
        ("--seconds 5", "--seconds=5.0: is too short; choose more than 10"),
        ("--dry --out {file}", "is not a folder; choose another"),
        ("--out {folder}/new", "torch sees no CUDA GPU; add DRY=1 to try it on the CPU"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "no CUDA" in message:
        pytest.skip("there is a CUDA GPU: the line is for those without one")
    (tmp_path / "file").write_text("")
    assert guarded(visit.run, words.format(file=tmp_path / "file", folder=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("words", "message"), [("--each 0 --dry", "must be positive"), ("", "there is no CIFAR-10")])
def test_a_mistake_of_cifar_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(cifar.run, words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_wrong_gradient_and_an_empty_expert_with_rubbish_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = smoke.passed("promoe", CPU, torch.float32, smoke.MIXED)
    for dtype in (torch.float32, torch.bfloat16):
        assert smoke.compared(expected, expected, dtype)["ok"]
        wrong = {name: g * 1.2 for name, g in expected.gradients.items()}
        assert not smoke.compared(expected._replace(gradients=wrong), expected, dtype)["ok"]

    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return w.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            out = grads[0].clone()
            out[1] = float("nan")  # what a kernel leaves that skips groups without rows
            return out

    real = smoke.grouped_mm
    monkeypatch.setattr(smoke, "grouped_mm", lambda x, w, offs: real(x, Unwritten.apply(w), offs=offs))
    found = smoke.grouped(dry(tmp_path), torch.bfloat16, (64, 0, 8))
    assert not found["ok"] and not found["empty_zero"]


def test_the_first_warning_of_the_debug_mode_is_no_sync() -> None:
    mode = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    assert not tells_of_a_sync(mode) and tells_of_a_sync("called a synchronizing CUDA operation")


def test_facts_need_neither_deepspeed_nor_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert common.commit() == "unknown"
    monkeypatch.setattr(common.importlib.metadata, "version", lambda name: _absent(name))
    assert common.facts()["versions"].endswith("deepspeed none")


def _absent(name: str) -> str:
    raise common.importlib.metadata.PackageNotFoundError(name)


def test_a_system_that_fails_in_any_way_does_not_end_the_others() -> None:
    def fails(clock: Any) -> None:
        raise RuntimeError("no kernel image")

    def works(clock: Any) -> None:
        clock.mark()
        clock.mark()

    found = interleaved({"fails": fails, "works": works}, CPU, 2)
    assert found["fails"] == {"failed": "RuntimeError: no kernel image"} and len(found["works"]["rounds"]) == 2


def test_every_point_starts_with_a_fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(throughput, "points", lambda args: ((f"step s fp32 micro {i}", dict) for i in (1, 2)))
    throughput.measure(throughput.parse_args(["--out", str(tmp_path)]))
    speed.emptied(dry(tmp_path))
    assert len(resets) == 3


def test_the_floor_multiplies_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = throughput.MoELayer(throughput.load_config("imagenet256_promoe_s", list(speed.TINY)))
    throughput.draw_weights(layer)
    seen: list[torch.Tensor] = []
    real = moe_peers.grouped_mm
    monkeypatch.setattr(moe_peers, "grouped_mm", lambda x, w, offs: seen.append(x) or real(x, w, offs=offs))
    split = throughput.split_of(4, CPU)
    work = moe_peers.gemms_alone(layer, torch.randn(4, 16, 48), split)
    throughput.interleaved({"floor": work}, CPU, 1)
    assert len(seen) >= 2 and all(x.std() > 0.5 for x in seen)


def test_a_whole_model_computes_by_the_loop() -> None:
    model = throughput.make_model("promoe_s", CPU, *speed.TINY)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), throughput.labels(4)
    plain = model(x, t, y)
    moe_peers.use_loop(model, True)
    loop = model(x, t, y)
    torch.testing.assert_close(loop.prediction, plain.prediction, rtol=1e-3, atol=1e-4)
    assert torch.equal(loop.tokens_per_expert_LE, plain.tokens_per_expert_LE)


def test_the_page_has_shares_of_the_cards_own_rate() -> None:
    step = {"forward_ms": 30.0, "backward_ms": 60.0, "update_ms": 10.0, "host_ms": 9.0, "device": "GPU"}
    step |= {"images_s": 640.0, "TFLOP_s": 400.0, "TFLOP_s_without_update": 444.4, "peak_gib": 50.0, "states_gib": 20.0}
    rows = [
        {"stage": "ceilings", "name": tables.CARD_PRODUCT, "device": "GPU", "TFLOP_s": 800.0},
        {"stage": "speed", "name": "promoe_xl 64 compiled", **step},
        {"stage": "speed", "name": "dense_xl 64 compiled", **step, "images_s": 800.0, "backward_ms": 42.0},
        {"stage": "speed", "name": "promoe_xl 128 plain", "device": "GPU", "failed": "out of memory"},
        {"stage": "smoke", "name": "promoe bf16", "device": "GPU", "ok": False, "gradients": 0.5},
    ]
    text = tables.page(json.loads(json.dumps(rows)))
    assert "| promoe_xl | 64 | compiled | 640 | 30 / 60 / 10 | 9 | 50.0% | 55.5% | 0.80 | 0.80 |  | 50 | 20 |" in text
    assert "| promoe_xl | 128 | plain | out of memory |" in text
    assert "| smoke | promoe bf16 | not ok: ok False, gradients 0.5 |" in text
    assert "## smoke: 0 of 1 are right" in text
