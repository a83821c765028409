"""Ranks and groups."""

from __future__ import annotations

import pytest

from promoe_ds.config.schema import ConfigError
from promoe_ds.parallel import topology
from promoe_ds.parallel.topology import Topology


def test_groups_are_consecutive_ranks() -> None:
    t = Topology(rank=5, world=8, local_rank=5, ep=4)
    assert t.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert t.ep_rank == 1 and t.expert_data_parallel == 2
    assert t.ep_groups()[t.rank // t.ep][t.ep_rank] == t.rank


def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert topology.from_environment(1) == Topology(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2"}, "environment RANK=2: is not below WORLD_SIZE=2; start with"),
        (
            {"WORLD_SIZE": "2"},
            r"environment RANK=\(not set\): WORLD_SIZE=2 processes cannot find each other",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, r"environment MASTER_PORT=\(not set\)"),
    ],
)
def test_half_an_environment(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        topology.from_environment(1)


def test_slurm_tells_the_place_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert topology.from_environment(1).local_rank == 1


def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="environment WORLD_SIZE='two': is not an integer; start with"):
        topology.world_size()


def test_tasks_of_srun_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS=4: each task would train alone.*slurm/launch.sh"):
        topology.from_environment(1)
