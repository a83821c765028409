"""Checkpoints: whole or not there, damage named, nothing of another run accepted.

One process and an object with the engine's state interface; the engine itself is in tests/distributed/test_train.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from promoe_ds.config import Config, ConfigError, load_config
from promoe_ds.train import checkpoint
from promoe_ds.train.checkpoint import Ranks, Reader

CONFIG = load_config("tiny")


class State:
    """The smallest thing with the engine's state interface: a dictionary of full tensors."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.params = {name: torch.randn(3, 2, generator=generator) for name in ("a", "b.c", "d")}
        states = ("fp32", "exp_avg", "exp_avg_sq", "ema")
        self.values = {(n, s): torch.randn(3, 2, generator=generator) for n in self.params for s in states}
        self.step = 0

    def read(self, name: str, state: str) -> Tensor:
        return self.values[name, state]

    def write(self, name: str, state: str, full: Tensor) -> None:
        self.values[name, state] = full

    def allocate(self, step: int) -> None:
        self.step = step
        self.values = {}

    def relink(self) -> None:
        pass


def save(run: Path, step: int, config: Config = CONFIG) -> State:
    state = State(step)
    checkpoint.save(run, state, {"fixed": torch.ones(2)}, step, config, Ranks(), {"world": 1})
    return state


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    state = save(tmp_path, 7)
    found = checkpoint.find_whole(tmp_path, Ranks())
    assert found == checkpoint.folder(tmp_path, 7) == checkpoint.newest(tmp_path)
    other = State(99)
    checkpoint.restore(Reader(found), other, 7)
    assert other.step == 7 and other.values.keys() == state.values.keys()
    assert all(torch.equal(other.values[key], state.values[key]) for key in state.values)


def test_several_ranks_share_the_writing(tmp_path: Path) -> None:
    """Both ranks' parts together are the state; simulated by saving each rank's share into one folder."""
    state = State(1)
    shares = [checkpoint._share(state, Ranks(rank, 2)) for rank in (0, 1)]
    assert shares[0].keys().isdisjoint(shares[1]) and len(shares[0]) + len(shares[1]) == 9


@pytest.mark.parametrize("how", ["truncate", "flip a bit", "delete"])
@pytest.mark.parametrize("victim", ["state-00000-of-00001.safetensors", "ema.safetensors", "manifest.json"])
def test_every_damage_is_named_and_the_one_before_is_offered(tmp_path: Path, victim: str, how: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    file = checkpoint.folder(tmp_path, 10) / victim
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[0 if victim.endswith("json") else len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        checkpoint.find_whole(tmp_path, Ranks())
    message = str(error.value)
    assert "step_00000010" in message and victim in message and "is damaged" in message and "\n" not in message
    assert "remove it to continue from step_00000005" in message
    shutil.rmtree(checkpoint.folder(tmp_path, 10))  # the way out, followed
    assert checkpoint.find_whole(tmp_path, Ranks()) == checkpoint.folder(tmp_path, 5)


def test_no_whole_checkpoint_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (checkpoint.folder(tmp_path, 5) / "ema.safetensors").unlink()
    with pytest.raises(ConfigError, match="no whole one is left"):
        checkpoint.find_whole(tmp_path, Ranks())
    assert checkpoint.newest(tmp_path) is None


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.copytree(checkpoint.folder(tmp_path, 5), tmp_path / "checkpoints" / "tmp_step_00000010")
    assert checkpoint.find_whole(tmp_path, Ranks()) == checkpoint.folder(tmp_path, 5)
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [checkpoint.step_of(p) for p in checkpoint.candidates(tmp_path)] == [2, 3]


def test_a_write_error_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ConfigError, match="cannot be written .*No space left on device.*free space"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert checkpoint.find_whole(tmp_path, Ranks()) == checkpoint.folder(tmp_path, 5)


def test_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = checkpoint.folder(tmp_path, 5)
    saved = checkpoint.manifest(found)["config"]
    checkpoint.check_same_run(saved, load_config("tiny", ["train.steps=99", "parallel.expert_parallel=4"]), found)
    with pytest.raises(
        ConfigError, match=r"optimizer.lr=0.5: .*was made with optimizer.lr=0.001; set optimizer.lr=0.001"
    ):
        checkpoint.check_same_run(saved, load_config("tiny", ["optimizer.lr=0.5"]), found)
    with pytest.raises(ConfigError, match="moe"):
        checkpoint.check_same_run(saved, load_config("tiny", ["moe=null"]), found)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    reader = Reader(checkpoint.folder(tmp_path, 5))
    with pytest.raises(ConfigError, match="holds no zebra/fp32"):
        checkpoint.load_weights(reader, {"zebra": torch.zeros(3, 2)}, lambda p, full: full)
    with pytest.raises(ConfigError, match=r"a has shape \[3, 2\], the model \[4, 2\]"):
        checkpoint.load_weights(reader, {"a": torch.zeros(4, 2)}, lambda p, full: full)


def test_buffers_come_back_from_the_ema_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    reader, buffer = Reader(checkpoint.folder(tmp_path, 5)), torch.zeros(2)
    checkpoint.load_buffers(reader, {"fixed": buffer})
    assert (buffer == 1).all()
    with pytest.raises(ConfigError, match="holds no ema/zebra"):
        checkpoint.load_buffers(reader, {"zebra": buffer})


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = checkpoint.folder(tmp_path, 5) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "other/9"}))
    with pytest.raises(ConfigError, match="is not of format promoe_ds/1"):
        checkpoint.manifest(checkpoint.folder(tmp_path, 5))


def test_unreadable_run_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="config.yaml: cannot be read"):
        checkpoint.saved_config(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [('"world": 1', '"world": 3'), ('"config": {', '"confih": {'), ('"bytes"', '"bytez"')]
)
def test_a_changed_manifest_is_damage(tmp_path: Path, old: str, new: str) -> None:
    save(tmp_path, 5)
    path = checkpoint.folder(tmp_path, 5) / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match="does not match its own checksum"):
        checkpoint.find_whole(tmp_path, Ranks())


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.folder(tmp_path, 5).rename(checkpoint.folder(tmp_path, 7))
    with pytest.raises(ConfigError, match="says step 5"):
        checkpoint.find_whole(tmp_path, Ranks())


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[1]"])
def test_a_damaged_run_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml: .*choose another --run"):
        checkpoint.saved_config(tmp_path)


def test_a_run_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a configuration that this version cannot read .*foo"):
        checkpoint.check_same_run({"foo": 1}, CONFIG, tmp_path)
