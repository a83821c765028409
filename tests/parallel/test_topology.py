"""Expert-parallel groups."""

from __future__ import annotations

from promoe_ds.parallel.topology import Topology
from promoe_ds.utils.ranks import Ranks


def test_groups_are_consecutive_ranks() -> None:
    t = Topology.of(Ranks(rank=5, world=8, local_rank=1), ep=4)
    assert t == Topology(5, 8, 1, 4)
    assert t.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert t.ep_rank == 1
    assert t.ep_groups()[t.rank // t.ep][t.ep_rank] == t.rank
