"""Log lines, their JSON twin, and what a resumed run drops."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.processes import PATIENCE
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.observe import watching
from promoe_ds.recipes.load import load_config
from promoe_ds.train import metrics
from promoe_ds.train.metrics import LAYERS_SHOWN, ExpertWatch, MetricsLog, duration, expert_load, shown
from tests.disk import tmpfs


def record(step: int) -> dict:
    return {
        **{"step": step, "loss": 1.5, "loss/diffusion": 1.25, "loss/routing_contrastive": 0.25, "grad_norm": 0.5},
        **{"images_per_s": 100.0, "mfu": None, "memory_gib": 0.5, "load_max_over_mean": 2.0, "dead_experts": 1},
        "seconds_per_step": 2.0,
    }


def test_expert_load() -> None:
    assert expert_load(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])) == (2.5, 3)
    assert expert_load(torch.zeros(2, 3, dtype=torch.int64)) == (0.0, 6)
    assert expert_load(torch.zeros(0, 0, dtype=torch.int64)) == (1.0, 0)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (200, "3m20s"), (7500, "2h05m"), (183600, "2d03h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_resumed_log_drops_later_and_broken_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, 100)
    for step in (10, 20, 30):
        log.write(record(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 20, 100)
    log.write(record(30))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    out = capsys.readouterr().out
    assert "step 30/100  loss 1.5000  diffusion 1.2500  routing_contrastive 0.2500  gnorm 0.500" in out
    assert "load 2.00x  dead 1  eta 2m20s" in out and "mfu" not in out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_a_full_disk_costs_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They wait in memory until there is room again."""
    with tmpfs(tmp_path / "disk", "100k") as disk:
        log, ballast = MetricsLog(disk, 0, 100), disk / "ballast"
        log.write(record(1))
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in range(2, 40):  # more than fits behind the first into its page
            log.write(record(step))
        assert "warning: " in (err := capsys.readouterr().err) and "No space left" in err
        ballast.unlink()
        log.write(record(40))
        log.close()
        lines = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(1, 41))


def test_a_lost_tensorboard_writer_does_not_hold_up_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the middle of `Queue.put` leaves a count that nobody takes back: closing would wait for ever."""
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.5, raising=False)
    log = MetricsLog(tmp_path, 0, 100)
    log.write(record(1))
    assert log.board and log.board.file_writer
    log.board.file_writer.event_writer._async_writer._byte_queue.unfinished_tasks += 1
    closing = threading.Thread(target=log.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert "TensorBoard's last records may be missing" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_report_is_what_the_routers_did() -> None:
    model = materialize(build(load_config("tiny")), 0)
    watch = ExpertWatch(model)
    label_B = torch.tensor([1, 2, 10, 3])
    t_B = torch.full((4,), 300.0)
    images, seen, outputs = torch.randn(2, 4, 1, 8, 8), [], []
    with watching(model, lambda block, router, x, routing: seen.append((block, routing))):
        for x_BCHW in images:  # two micro-batches
            outputs.append(model(x_BCHW, t_B, label_B))
            watch.see(outputs[-1])
    load = [output.tokens_per_expert_LE for output in outputs]
    asked: list[str] = []
    gradients = lambda n: asked.extend(n) or {name: torch.full((2, 2), i + 1.0) for i, name in enumerate(n)}  # noqa: E731
    # as if a second rank had the same
    layers = watch.report(load[0] + load[1], lambda x: 2 * x, gradients=gradients)
    assert asked == ["blocks.1.mlp.router.prototypes", "blocks.3.mlp.router.prototypes"]
    assert layers["router_grad_norm"] == [2.0, 4.0]
    assert layers["block"] == [1, 3] and len(seen) == 4
    for row, block in enumerate(layers["block"]):
        weight_N = torch.cat([routing.weight_N.detach() for b, routing in seen if b == block]).double()
        losses = [float(output.aux_losses["routing_contrastive"][row].detach()) for output in outputs]
        assert math.isclose(layers["gate_mean"][row], weight_N.mean(), rel_tol=1e-5)
        assert math.isclose(layers["gate_std"][row], weight_N.std(unbiased=False), rel_tol=1e-4)
        assert math.isclose(layers["loss/routing_contrastive"][row], sum(losses) / 2, rel_tol=1e-5)
        norms = model.blocks[block].mlp.router.prototypes.detach().norm(dim=1)
        assert math.isclose(layers["prototype_norm"][row], norms.mean(), rel_tol=1e-5)
    watch.start()
    assert watch.report(load[0], lambda x: x).keys() == {"block", "load_max_over_mean", "load_entropy", "dead_experts"}


def test_a_dense_model_has_nothing_to_report() -> None:
    model = materialize(build(load_config("tiny", ["moe=null"])), 0)
    watch = ExpertWatch(model)
    watch.see(model(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([1])))
    assert watch.report(torch.zeros(0, 0), lambda x: x) == {} == shown({})


def test_scores_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 5)
    log.scores(3, {"num": 8, "fd": 1.5, "is": math.inf, "kid": math.nan}, 0.1)
    log.close()
    (record,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record) == {"step": 3, "scores": {"num": 8, "fd": 1.5, "is": None, "kid": None}}
    assert "Infinity" not in record and "NaN" not in record


def test_tags_are_capped() -> None:
    layers = {"block": list(range(1, 57, 2)), "load_entropy": [0.5] * 27 + [None]}
    tags = shown(layers)
    assert len(tags) == LAYERS_SHOWN - 1 and "layers/load_entropy/block_01" in tags  # None has no tag
    assert shown({"block": [3], "gate_mean": [0.25]}) == {"layers/gate_mean/block_03": 0.25}


def test_lines_that_are_no_records_are_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But not the last, which was being written when the run was killed."""
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    MetricsLog(tmp_path, 2, 3).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n' and not copy.exists()
    damaged = b'{"step": 1}\n\xff"step": 2}\n{"step": 3}\n'
    path.write_bytes(damaged)
    MetricsLog(tmp_path, 3, 3).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n' and copy.read_bytes() == damaged
    assert "metrics.jsonl: 1 lines are no records; the file is kept as metrics.jsonl.damaged" in capsys.readouterr().err
