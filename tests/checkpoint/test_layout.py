"""Checkpoints: whole or not there, and every damage named."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest

from promoe_ds.checkpoint import layout
from promoe_ds.checkpoint.load_weights import find_weights
from promoe_ds.checkpoint.resume import Reader
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import OptimizerConfig
from promoe_ds.utils.ranks import ALONE
from tests.checkpoint.state import on_ranks, save, save_on
from tests.disk import as_nobody, loop

FILES = ("state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", "ema.safetensors", "manifest.json")


def hurt(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "truncate":
        del data[-1:]
    elif how == "empty":
        data.clear()
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": len(data) - 2}[how.split()[0]]] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncate", "empty", "delete", "first byte", "middle byte", "last byte"])
@pytest.mark.parametrize("victim", FILES)
def test_every_damage_to_every_file_is_named_and_nothing_loads(tmp_path: Path, victim: str, how: str) -> None:
    save(tmp_path, 5)
    assert save_on(2, tmp_path, 10) == [None, None]
    found = layout.folder(tmp_path, 10)
    assert {p.name for p in found.iterdir()} == set(FILES), "a file that this test does not hurt"
    hurt(found / victim, how)
    assert [victim in fault for fault in layout.damages(found)] == [True]
    for world in (1, 3):  # the ranks share the reading, and all of them hear of it
        for error in on_ranks(world, lambda ranks: layout.find_whole(tmp_path, ranks)):
            message = str(error)
            assert isinstance(error, ConfigError) and "\n" not in message
            assert "step_00000010: is damaged: " in message and victim in message
            assert "remove it to continue from step_00000005: python launchers/checkpoint.py prune --run " in message
    if how in ("truncate", "empty", "delete") or victim == "manifest.json":  # sampling: its digest is checked later
        with pytest.raises(ConfigError, match=f"is damaged.*{victim}"):
            find_weights(tmp_path)
        with pytest.raises(ConfigError, match=f"is damaged.*{victim}|no complete checkpoint"):
            find_weights(found)
    shutil.rmtree(found)  # the way out, followed
    assert layout.find_whole(tmp_path, ALONE) == layout.folder(tmp_path, 5)


@pytest.mark.parametrize("victim", [*FILES, ""])
def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, victim: str) -> None:
    """A file of the newest checkpoint, or its whole folder."""
    save(tmp_path, 5)
    assert save_on(2, tmp_path, 10) == [None, None]
    found = layout.folder(tmp_path, 10)
    loop(found / victim)
    said = rf"={found / (victim or 'manifest.json')}: cannot be read \(Too many levels of symbolic links\); "
    for world in (1, 3):  # the ranks share the reading, and all of them hear of it
        errors = on_ranks(world, lambda ranks: layout.find_whole(tmp_path, ranks))
        assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], ConfigError)
        assert re.search(said, str(errors[0])) and "prune" not in str(errors[0])
    for look in (layout.newest, find_weights, lambda run: list(layout.damages(found))):
        with pytest.raises(ConfigError, match=said):
            look(tmp_path)
    with pytest.raises(ConfigError, match=rf"={found}.*: cannot be read"):
        find_weights(found)


def test_nothing_is_advised_where_the_one_before_cannot_be_read(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    loop(layout.folder(tmp_path, 5) / FILES[2])
    hurt(layout.folder(tmp_path, 10) / FILES[2], "truncate")
    for world in (1, 3):
        for error in on_ranks(world, lambda ranks: layout.find_whole(tmp_path, ranks)):
            assert isinstance(error, ConfigError) and "step_00000005/ema.safetensors: cannot be read" in str(error)
    with pytest.raises(ConfigError, match="step_00000005/ema.safetensors: cannot be read"):
        find_weights(tmp_path)


def test_checkpoints_that_cannot_be_listed_are_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 5)
    loop(tmp_path / "checkpoints")
    for look in (layout.candidates, layout.newest, find_weights):
        with pytest.raises(ConfigError, match=r"checkpoints: cannot be read \(Too many levels"):
            look(tmp_path)
    for error in on_ranks(3, lambda ranks: layout.find_whole(tmp_path, ranks)):
        assert isinstance(error, ConfigError) and "checkpoints: cannot be read" in str(error)


def test_every_fault_is_listed(tmp_path: Path) -> None:
    save_on(2, tmp_path, 10)
    found = layout.folder(tmp_path, 10)
    for victim in FILES[:3]:
        hurt(found / victim, "last byte")
    assert [fault.split()[0] for fault in layout.damages(found)] == sorted(FILES[:3])
    assert len(list(layout.damages(found, read_bytes=False))) == 0, "sizes alone show nothing"


def test_no_whole_checkpoint_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (layout.folder(tmp_path, 5) / "ema.safetensors").unlink()
    with pytest.raises(ConfigError, match="no whole one is left"):
        layout.find_whole(tmp_path, ALONE)
    assert layout.newest(tmp_path) is None


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.copytree(layout.folder(tmp_path, 5), tmp_path / "checkpoints" / "tmp_step_00000010")
    assert layout.find_whole(tmp_path, ALONE) == layout.folder(tmp_path, 5)
    save(tmp_path, 6)  # the next save clears it away
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000005", "step_00000006"]


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = layout.folder(tmp_path, 5) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "other/9"}))
    with pytest.raises(ConfigError, match="is not of format promoe_ds/1"):
        layout.manifest(layout.folder(tmp_path, 5))


@pytest.mark.parametrize(
    ("old", "new"), [('"world": 1', '"world": 3'), ('"config": {', '"confih": {'), ('"bytes"', '"bytez"')]
)
def test_a_changed_manifest_is_damage(tmp_path: Path, old: str, new: str) -> None:
    save(tmp_path, 5)
    path = layout.folder(tmp_path, 5) / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match="does not match its own checksum"):
        layout.find_whole(tmp_path, ALONE)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, 5)
    layout.folder(tmp_path, 5).rename(layout.folder(tmp_path, 7))
    with pytest.raises(ConfigError, match="says step 5"):
        layout.find_whole(tmp_path, ALONE)


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = layout.folder(tmp_path, 5)
    tree = layout.manifest(found)
    layout.write_manifest(found, tree | {"files": {"../secret": {"bytes": 1, "blake2b": ""}}})
    with pytest.raises(ConfigError, match="names files elsewhere"):
        Reader(found)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(layout.fcntl, "flock", refuse)
    layout.claim(tmp_path / "run").close()
    assert "is on a file system without locks: start one job per folder" in capsys.readouterr().err


def test_a_folder_that_is_refused_leaves_nothing(shared: Path) -> None:
    (shared / "closed").mkdir(mode=0o700)
    run = shared / "runs" / ".." / "closed" / "run"
    with pytest.raises(ConfigError, match=r"--run=.*: cannot be written \(Permission denied\); choose another folder"):
        as_nobody(lambda: layout.claim(run))
    assert [p.name for p in shared.iterdir()] == ["closed"]


def test_the_newest_is_the_last_step_however_many_digits_it_has(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    assert [layout.step_of(path) for path in layout.candidates(tmp_path)][-1] == 100_000_000
    assert layout.newest(tmp_path) == layout.folder(tmp_path, 100_000_000)


def test_sizes_for_people() -> None:
    counts = (0, 1023, 1024, 3.5 * 2**20, 2**40)
    assert [layout.size(n) for n in counts] == ["0 B", "1023 B", "1.0 KiB", "3.5 MiB", "1.0 TiB"]


def test_the_file_of_an_average_is_known_by_its_name() -> None:
    """However its decay is written: 1e-05 has letters."""
    for name in OptimizerConfig(ema_more=(0.0, 1e-05, 5e-324, 0.5, 0.9999999999999999)).averages():
        found = layout.AVERAGE.fullmatch(f"{name}.safetensors")
        assert found and found[1] == name
    assert not layout.AVERAGE.fullmatch("state-00000-of-00001.safetensors")
