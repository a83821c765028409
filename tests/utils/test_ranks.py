"""Who this process is among those of a job."""

from __future__ import annotations

import pytest

from promoe_ds.config.errors import ConfigError
from promoe_ds.utils.ranks import ALONE, Ranks

LAUNCHERS = "start with deepspeed, torchrun or slurm/launch.sh"
WAY_OUT = f"{LAUNCHERS}, or export RANK and WORLD_SIZE"
BY_SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


def told(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], srun: bool = False) -> Ranks:
    """What a process makes of these variables alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *BY_SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Ranks.from_environment(srun)


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, {}) == ALONE == Ranks(0, 1, 0)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    for srun in (False, True):
        assert told(monkeypatch, launched, srun) == Ranks(5, 8, 1)
        assert told(monkeypatch, BY_SRUN | launched | {"LOCAL_RANK": "2"}, srun) == Ranks(5, 8, 2)


@pytest.mark.parametrize("srun", [False, True])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, f"RANK=2: is not below WORLD_SIZE=2; {WAY_OUT}"),
        ({"RANK": "1"}, f"RANK=1: is not below WORLD_SIZE=1; {WAY_OUT}"),
        ({"WORLD_SIZE": "0"}, f"RANK=0: is not below WORLD_SIZE=0; {WAY_OUT}"),
        ({"WORLD_SIZE": "2"}, "RANK=(not set): WORLD_SIZE=2 processes cannot be told apart without it; "
                              f"{WAY_OUT}"),
        ({"RANK": "x"}, f"RANK='x': is not a number; {LAUNCHERS}, or unset it"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, f"RANK='-1': is not a number; {LAUNCHERS}, or unset it"),
        ({"WORLD_SIZE": "two"}, f"WORLD_SIZE='two': is not a number; {LAUNCHERS}, or unset it"),
        ({"LOCAL_RANK": "1.5"}, f"LOCAL_RANK='1.5': is not a number; {LAUNCHERS}, or unset it"),
    ],
)  # fmt: skip
def test_a_broken_environment_is_one_line(
    environment: dict[str, str], message: str, srun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        told(monkeypatch, environment, srun)
    assert str(caught.value) == f"environment {message}"


def test_srun_numbers_are_taken_where_processes_need_not_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, BY_SRUN, srun=True) == Ranks(3, 8, 1)
    with pytest.raises(ConfigError, match="^environment SLURM_PROCID=3: is not below SLURM_STEP_NUM_TASKS=1; "):
        told(monkeypatch, {"SLURM_PROCID": "3"}, srun=True)


@pytest.mark.parametrize("half", [{}, {"RANK": "0"}, {"WORLD_SIZE": "8"}])
def test_tasks_of_srun_that_do_not_know_of_each_other(half: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "environment SLURM_STEP_NUM_TASKS=8: each task would do everything: RANK and WORLD_SIZE are not both set; "
        f"{WAY_OUT}"
    )
    for srun in (False, True) if half else (False,):
        with pytest.raises(ConfigError) as caught:
            told(monkeypatch, BY_SRUN | half, srun)
        assert str(caught.value) == message
    alone = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert told(monkeypatch, alone) == ALONE


@pytest.mark.parametrize("srun", [False, True])
def test_slurm_tells_the_place_on_the_machine(srun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RANK and WORLD_SIZE were exported by hand."""
    assert told(monkeypatch, BY_SRUN | {"RANK": "3", "WORLD_SIZE": "4"}, srun) == Ranks(3, 4, 1)


def test_a_rank_outside_of_its_world_is_a_programming_error() -> None:
    for rank, world in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank {rank} of a world of {world}"):
            Ranks(rank, world)


def test_a_process_alone_needs_no_process_group() -> None:
    assert ALONE.gather("x") == ["x"] == ALONE.gather_to_first("x")
    ALONE.barrier()
