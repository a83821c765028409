"""Saving: written behind the steps, and a save that fails costs nothing that was there before."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.processes import PATIENCE
from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint import save as saving
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.checkpoint.save import share
from promoe_ds.config.errors import ConfigError
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.ranks import ALONE, Ranks
from tests.checkpoint.state import CONFIG, State, on_ranks, save, saver
from tests.disk import loop, resize, tmpfs

CONTINUE = load_config("tiny", ["train.on_save_error=continue"])
FIXED = {"fixed": torch.ones(2)}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_several_ranks_share_the_writing() -> None:
    shares = [share(State(1), Ranks(rank, 2)) for rank in (0, 1)]
    assert shares[0].keys().isdisjoint(shares[1]) and len(shares[0]) + len(shares[1]) == 9


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written when the event is set."""
    event = threading.Event()
    real = saving.save_file

    def later(*args: Any, **kwargs: Any) -> None:
        assert event.wait(PATIENCE)
        real(*args, **kwargs)

    monkeypatch.setattr(saving, "save_file", later)
    yield event
    event.set()


def test_training_goes_on_while_the_files_are_written(tmp_path: Path, held: threading.Event) -> None:
    """What is saved is the state of the step, whatever happens to it afterwards; before the end there is no name."""
    state, fixed = State(5), {"fixed": torch.ones(2)}
    expected = {key: tensor.clone() for key, tensor in state.values.items()}
    job = saver(tmp_path, state)
    job.save(5, fixed)
    for tensor in [*state.values.values(), *fixed.values()]:
        tensor.fill_(-1)
    job.poll()
    assert not job.written and names(tmp_path) == ["tmp_step_00000005"]
    assert layout.find_whole(tmp_path, ALONE) is None
    held.set()
    while not job.written:
        pass
    assert names(tmp_path) == ["tmp_step_00000005"], "it gets its name in poll, on every rank after the same step"
    job.poll()
    reader = Reader(layout.folder(tmp_path, 5))
    assert all(torch.equal(reader(*key), tensor) for key, tensor in expected.items())
    assert torch.equal(reader("fixed", "ema"), torch.ones(2)) and not job.written


def test_no_rank_is_ahead_of_the_slowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is done long before rank 1: it completes nothing until both are."""
    event, real = threading.Event(), saving.save_file

    def late_on_rank_1(tensors: Any, path: Path, metadata: Any) -> None:
        assert "00001-of" not in path.name or event.wait(PATIENCE)
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(saving, "save_file", late_on_rank_1)

    def train(ranks: Ranks) -> list[list[str]]:
        job, seen = saver(tmp_path, State(5), CONFIG, ranks), []
        job.save(5, FIXED)
        for late in (False, True):
            if late:
                event.set()
            thread = job.job and job.job.thread
            if thread and (late or ranks.rank == 0):
                thread.join()
            job.poll()
            ranks.gather(None)
            seen.append(names(tmp_path))
            ranks.gather(None)
        return seen

    assert on_ranks(2, train) == [[["tmp_step_00000005"], ["step_00000005"]]] * 2
    assert layout.damage(layout.folder(tmp_path, 5)) is None


def test_a_save_waits_for_the_one_before(tmp_path: Path, held: threading.Event) -> None:
    job = saver(tmp_path, State(5))
    job.save(5, FIXED)
    threading.Timer(0.1, held.set).start()
    job.save(6, FIXED, last=True)
    assert names(tmp_path) == ["step_00000005", "step_00000006"]


def test_the_order_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, manifest, folder, name, parent; then the deletion of what is older."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}"), real_fsync(fd))
    )
    number = f".{os.uname().nodename}-{os.getpid()}.tmp"  # flushed before it takes its name
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"{a.name} -> {b.name}"), real_rename(a, b))[1])
    config = load_config("tiny", ["train.keep_last=1"])
    save(tmp_path, 4, config)
    events.clear()
    save(tmp_path, 5, config)
    assert events == [
        f"sync .ema.safetensors{number}",
        f"sync .state-00000-of-00001.safetensors{number}",
        f"sync .manifest.json{number}",
        "sync tmp_step_00000005",
        "tmp_step_00000005 -> step_00000005",
        "sync checkpoints",
        "step_00000004 -> tmp_deleted_step_00000004",
    ]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    saver(tmp_path, State(99)).save(5, FIXED, last=True)
    assert torch.equal(Reader(layout.folder(tmp_path, 5))("a", "fp32"), State(99).values["a", "fp32"])
    assert names(tmp_path) == ["step_00000005"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = layout.folder(tmp_path, 5)
    old.mkdir(parents=True)
    with tmpfs(old, "100k"):  # the kernel lets nobody rename it
        for step in (10, 15):
            save(tmp_path, step)
        saving.prune(tmp_path, 1)
        assert names(tmp_path) == [old.name, "step_00000015"]
    assert f"warning: {old} cannot be deleted (" in capsys.readouterr().err


def test_a_write_error_on_one_rank_is_known_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    real = saving.save_file

    def full_on_rank_1(tensors: Any, path: Path, metadata: Any) -> None:
        (full if "00001-of" in path.name else real)(tensors, path, metadata=metadata)

    monkeypatch.setattr(saving, "save_file", full_on_rank_1)
    errors = on_ranks(3, lambda ranks: saver(tmp_path, State(1), CONFIG, ranks).save(10, FIXED, last=True))
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], ConfigError)
    text = str(errors[0])
    assert "step_00000010: cannot be written (rank 1: [Errno 28] No space left on device; it needs " in text
    assert "step_00000005 is unharmed; free space or fix the folder, then resume" in text
    assert names(tmp_path) == ["step_00000005"] and layout.find_whole(tmp_path, ALONE)


@pytest.mark.parametrize("config", [CONFIG, CONTINUE])
def test_a_failure_behind_the_steps_stops_or_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Any
) -> None:
    save(tmp_path, 5)
    job = saver(tmp_path, State(1), config)
    monkeypatch.setattr(saving, "save_file", full)
    job.save(10, FIXED)
    if config is CONFIG:
        with pytest.raises(ConfigError, match="No space left"):
            job.finish()
    else:
        job.finish()
        warning = capsys.readouterr().err
        assert warning.startswith("warning: checkpoint=") and "training goes on and tries again" in warning
        job.save(11, FIXED)
        with pytest.raises(ConfigError, match="step_00000012: cannot be written"):  # the last one always stops it
            job.save(12, FIXED, last=True)
    assert names(tmp_path) == ["step_00000005"]
    monkeypatch.undo()
    job.save(13, FIXED, last=True)
    assert names(tmp_path) == ["step_00000005", "step_00000013"]


def test_a_save_fails_where_the_others_cannot_be_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 5)
    job = saver(tmp_path, State(1), CONTINUE)
    loop(tmp_path / "checkpoints")
    job.save(10, FIXED)
    assert "those before it cannot be listed now; training goes on and tries again" in capsys.readouterr().err


def test_the_last_save_is_tried_although_the_one_before_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = saver(tmp_path, State(1))
    monkeypatch.setattr(saving, "save_file", full)
    job.save(10, FIXED)
    assert job.job and job.job.thread
    job.job.thread.join()
    monkeypatch.undo()
    job.save(11, FIXED, last=True)
    assert names(tmp_path) == ["step_00000011"] and "step_00000010: cannot be written" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "400k") as disk:
        yield disk


def test_disk_full_is_seen_before_writing(small_disk: Path) -> None:
    """One checkpoint of 200 KiB fits on it, two do not: the message says what is needed and what is free."""
    rows = 2100
    save(small_disk / "run", 5, rows=rows)
    job = saver(small_disk / "run", State(1, rows))
    with pytest.raises(
        ConfigError, match=r"it needs 2\d\d\.\d KiB, the disk has 1\d\d\.\d KiB free\); step_00000005 is"
    ):
        job.save(10, FIXED)
    assert names(small_disk / "run") == ["step_00000005"]
    assert layout.find_whole(small_disk / "run", ALONE)
    resize(small_disk, "800k")
    job.save(11, FIXED, last=True)
    assert names(small_disk / "run") == ["step_00000005", "step_00000011"]


def test_disk_filling_up_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by somebody else's files: the kernel refuses in the middle."""
    rows = 2100
    save(small_disk / "run", 5, rows=rows)
    monkeypatch.setattr(saving, "make_room", lambda temporary, need: temporary.mkdir(parents=True))
    with pytest.raises(
        ConfigError, match=r"rank 0: .*No space left on device.*; it needs 2.* KiB, the disk has 1.* KiB"
    ):
        saver(small_disk / "run", State(1, rows)).save(10, FIXED, last=True)
    assert names(small_disk / "run") == ["step_00000005"]
    assert layout.find_whole(small_disk / "run", ALONE)
