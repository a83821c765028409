"""Several EMAs at once, through the real trainer on two processes: each is that of a run of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launchers import export
from promoe_ds.api import load_model
from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.convert import resplit
from promoe_ds.checkpoint.resume import Reader
from tests.launch import run, torchrun

MORE = "optimizer.ema_more=[0.5, 0.99]"
FILES = ("ema.safetensors", "ema_0.5.safetensors", "ema_0.99.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 6 steps: the set at every kind of ZeRO, each decay alone, and the set resumed at another stage."""
    folder, often = tmp_path_factory.mktemp("averages"), ("train.log_every=100", "train.checkpoint_every=3")
    work = [(f"set{stage}", f"zero{stage}", MORE, *often) for stage in (0, 2, 3)]
    work += [(f"alone{decay}", "zero2", f"optimizer.ema_decay={decay}", *often) for decay in ("0.5", "0.99")]
    start = layout.folder(folder / "resumed", 3)
    start.parent.mkdir(parents=True)
    os.symlink(layout.folder(folder / "set2", 3), start)
    work.append(("resumed", "zero3", MORE, *often))
    run(torchrun(2, "tests/distributed/train_worker.py", str(folder), json.dumps(work)))
    return folder


def average(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(layout.folder(folder, 6) / name)


def test_each_is_that_of_a_run_of_its_own(folder: Path) -> None:
    """To the bit at one stage, to rounding at others."""
    for name, alone in zip(FILES[1:], ("alone0.5", "alone0.99"), strict=True):
        one = average(folder / alone, FILES[0])
        together = average(folder / "set2", name)
        assert one.keys() == together.keys() and all(torch.equal(one[key], together[key]) for key in one)
        assert any(not torch.equal(one[key], other) for key, other in average(folder / "set2", FILES[0]).items())
    for stage in ("set0", "set3", "resumed"):
        for name in FILES:
            torch.testing.assert_close(average(folder / stage, name), average(folder / "set2", name), rtol=0, atol=1e-5)


def test_they_are_exported_split_and_loaded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def exported(out: str, *args: str) -> int:
        return export.main(["--run", str(folder / "set2"), "--out", str(tmp_path / out), *args])

    half = average(folder / "set2", FILES[1])
    assert exported("half", "--ema", "0.5") == exported("again", "--ema", "0.9") == exported("first") == 0
    assert all(torch.equal(half[k], x) for k, x in load_file(tmp_path / "half" / "model.safetensors").items())
    assert "EMA 0.5" in (tmp_path / "half" / "README.md").read_text()
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert export.main(["--model", str(tmp_path / "half"), "--out", str(tmp_path / "copy")]) == 0
    assert "EMA 0.5" in (tmp_path / "copy" / "README.md").read_text()
    direct = load_model(layout.folder(folder / "set2", 6) / FILES[1])
    assert all(torch.equal(half[key], x) for key, x in direct.state_dict().items())
    split = resplit(layout.folder(folder / "set2", 6), tmp_path / "run", 3)
    assert layout.damage(split) is None and {*FILES} <= {path.name for path in split.iterdir()}
    assert Reader(split).averages == ["ema", "ema_0.5", "ema_0.99"]
    for args, message in (
        (("--ema", "0.7"), "--ema=0.7: the run kept an EMA of decay 0.9 and 0.5 and 0.99; choose one of these"),
        (("--ema", "0.5", "--weights", "raw"), "--ema=0.5: raw weights are no average; leave one of them out"),
        (("--ema", "0.5", "--format", "official"), "--ema=0.5: official files are fp32 with both weights"),
    ):
        capsys.readouterr()
        assert exported("bad", *args) == 2
        assert message in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert export.main(["--model", str(tmp_path / "half"), "--out", str(tmp_path / "x"), "--ema", "0.5"]) == 2
    assert "holds one kind of weights" in capsys.readouterr().err
