"""The folder of a report: nothing of an earlier one stays, nothing of the user's goes, no two runs share a file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.analysis import figures as draw
from promoe_ds.analysis.report import REPORT, Writer, _training, check_folder, prepare_folder, slugs
from promoe_ds.config.errors import ConfigError


def write(out: Path, *names: str) -> None:
    writer = Writer()
    writer.files |= {name: name.encode() for name in (*names, REPORT)}
    check_folder(out)
    writer.write(out)


def held(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {REPORT, "files.json"}


def test_files_of_an_earlier_report_go_and_the_users_stay(tmp_path: Path) -> None:
    write(tmp_path, "load.png", "use_by_class_block3.png", "other.layers.csv")
    (tmp_path / "notes.png").write_bytes(b"mine")
    write(tmp_path, "load.png")
    assert held(tmp_path) == {"load.png", "notes.png"}
    (tmp_path / "files.json").write_text('["../x", "notes.png/..", "load.png", 3, "report.html"]')
    (tmp_path.parent / "x").write_text("elsewhere")
    write(tmp_path, "explained.png")
    assert held(tmp_path) == {"explained.png", "notes.png"} and (tmp_path.parent / "x").exists()
    (tmp_path / "files.json").write_text("3")
    write(tmp_path, "load.png")
    assert held(tmp_path) == {"load.png", "explained.png", "notes.png"}


def test_a_list_of_files_that_is_no_reports_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "0001.png").write_bytes(b"mine")
    for listed in ('["0001.png"]', '{"report.html": 1}', "3"):
        (tmp_path / "files.json").write_text(listed)
        with pytest.raises(ConfigError, match="holds files but no files.json of a report"):
            check_folder(tmp_path)


def test_a_page_of_somebody_elses_is_no_report(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no files.json of a report"):
        check_folder(tmp_path)


def test_a_report_that_was_interrupted_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.png", "b.png")

    def dies(path: Path, data: bytes) -> None:
        if path.name.startswith((".d.png", "d.png")):
            raise KeyboardInterrupt
        path.open("wb").write(data)

    (tmp_path / REPORT).unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", dies)
        write(tmp_path, "c.png", "d.png")
    assert held(tmp_path) == {"a.png", "b.png", "c.png"}
    write(tmp_path, "e.png")
    assert held(tmp_path) == {"e.png"} and (tmp_path / REPORT).exists()
    for name in (REPORT, "files.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="holds files but no files.json of a report"):
        check_folder(tmp_path)


def test_no_two_runs_share_a_name() -> None:
    names = ["a b", "a_b", "a/b", "a_b_2", "c"]
    assert list(slugs(names).values()) == ["a_b", "a_b_2", "a_b_3", "a_b_2_2", "c"]


def test_scores_while_training_stand_before_those_of_samples(tmp_path: Path) -> None:
    """Records of scores are in no curve."""
    log = [{"step": i, "loss": 1.0, "loss/diffusion": 1.0, "load_max_over_mean": 2.0} for i in (1, 2)]
    scored = [
        {"step": i, "scores": {"samples": f"step {i}", "FID": 9.0 - i, "recall": 0.0, "KID": None}} for i in (1, 2)
    ]
    lines = [json.dumps(record) for pair in zip(log, scored, strict=True) for record in pair]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    sets = [{"samples": "runs/a/samples/cfg1.5/samples.npz", "FID": 2.5, "IS": 3.0}]
    (tmp_path / "metrics.json").write_text(json.dumps({"sets": sets}))
    writer = Writer()
    ((_, shown),) = _training(writer, tmp_path)
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", shown)]
    assert rows == [["samples", "FID", "recall", "IS"], ["step 1", "8", "0", "–"], ["step 2", "7", "0", "–"],
                    ["cfg1.5", "2.5", "–", "3"]]  # fmt: skip
    assert list(writer.files) == ["training.png"]


def test_the_log_shows_the_gradient_of_every_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line per layer; a gap where a number is none. Steps logged before the norm was are left out."""
    log = [{"step": i, "loss": 1.0, "loss/diffusion": 1.0} for i in (1, 2, 3, 4)]
    for record, norms in zip(log[1:], ([0.5, 1e-9], [None, 0.0], [0.25, 1e-9]), strict=True):
        record["layers"] = {"block": [1, 3], "router_grad_norm": norms}
    figures: dict[str, Any] = {}
    monkeypatch.setattr(Writer, "figure", lambda self, name, png, caption: figures.setdefault(name, png) and "")
    monkeypatch.setattr(draw, "_png", lambda figure: figure)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    _training(Writer(), tmp_path)
    assert list(figures) == ["training", "router_gradients"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures["router_gradients"].axes[0].lines}
    assert lines == {"1": [[2, 0.5], [3, pytest.approx(math.nan, nan_ok=True)], [4, 0.25]],
                     "3": [[2, 1e-9], [3, 0], [4, 1e-9]]}  # fmt: skip
    figures.clear()
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, log[:2])))
    _training(Writer(), tmp_path)
    assert list(figures) == ["training"], "one point is no line"


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new" / "report")
    assert list((tmp_path / "new" / "report").iterdir()) == []
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "report", Path("/proc/report")):
        with pytest.raises(ConfigError, match=f"--out={out}: cannot be written"):
            prepare_folder(out)
