"""Expert-parallel groups."""

from __future__ import annotations

import subprocess
import sys

import pytest

from promoe_ds.parallel.topology import Topology
from promoe_ds.utils.ranks import Ranks
from tests.launch import ENVIRONMENT

CONNECTS = """
import deepspeed.ops
from promoe_ds.parallel.topology import connect
from promoe_ds.utils.ranks import ALONE

def probe():
    raise AssertionError("DeepSpeed asked for its operators")

deepspeed.ops._probe_compatible_ops = probe
connect(ALONE, 1.0)
"""


@pytest.mark.slow
def test_no_operator_is_asked_for_when_ranks_meet() -> None:
    """Each question starts a compiler."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECTS], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_groups_are_consecutive_ranks() -> None:
    t = Topology.of(Ranks(rank=5, world=8, local_rank=1), ep=4)
    assert t == Topology(5, 8, 1, 4)
    assert t.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert t.ep_rank == 1
    assert t.ep_groups()[t.rank // t.ep][t.ep_rank] == t.rank
