"""Who this process is among those of a job."""

from __future__ import annotations

import pytest

from promoe_ds.config.schema import ConfigError
from promoe_ds.utils.ranks import Worker, worker_from


def test_worker_comes_from_the_environment() -> None:
    assert worker_from({}) == Worker(0, 1, 0)
    assert worker_from({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Worker(5, 8, 1)
    for environ, message in (
        ({"RANK": "2", "WORLD_SIZE": "2"}, "^RANK=2: .*not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE=2: is set in the environment without RANK"),
        ({"RANK": "x"}, "^RANK='x': the environment variable is not a number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "^environment SLURM_STEP_NUM_TASKS=4: each task would make everything"),
    ):
        with pytest.raises(ConfigError, match=message):
            worker_from(environ)


def test_srun_numbers_are_taken_where_processes_need_not_talk() -> None:
    environ = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert worker_from(environ, srun=True) == Worker(3, 8, 1)
    assert worker_from({**environ, "RANK": "1", "WORLD_SIZE": "2"}, srun=True) == Worker(1, 2, 0)
