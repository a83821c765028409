"""Run by test_groups.py under torchrun: the timeout of every process group of a trainer, and of sampling."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from promoe_ds.models.init import build, materialize
from promoe_ds.parallel import topology
from promoe_ds.parallel.expert_parallel import ExpertParallelExperts, share_experts
from tests.distributed.train_worker import make


def minutes(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout / datetime.timedelta(minutes=1)


def main() -> None:
    trainer = make(Path(sys.argv[1]), "zero2", "parallel.timeout_minutes=77")
    here = trainer.topology
    sampled = share_experts(materialize(build(trainer.config), seed=0), here)
    shared = [module.ep_group for module in sampled.modules() if isinstance(module, ExpertParallelExperts)]
    found = {
        "world": dist.group.WORLD,
        "experts": groups._get_expert_parallel_group("ep_size_2"),
        "replicas of experts": groups._get_expert_data_parallel_group("ep_size_2"),
        "experts of sampling": shared[0],
    }
    found |= {f"group {i}": group for i, group in enumerate(dist.distributed_c10d._world.pg_map)}
    everyone = here.gather({name: minutes(group) for name, group in found.items()})
    if here.rank == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    trainer.close()
    topology.disconnect()
    topology.leave(0)


if __name__ == "__main__":
    main()
