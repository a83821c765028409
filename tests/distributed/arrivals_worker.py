"""Run by test_arrivals.py under torchrun: the order in which gradients arrive in each of two micro-batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from promoe_ds.parallel import topology
from tests.distributed.train_worker import make


def main() -> None:
    options = ["train.precision=bf16_autocast", "train.global_batch_size=32", "train.micro_batch_size=8"]
    trainer = make(Path(sys.argv[1]), sys.argv[2], *options, "train.steps=1", "parallel.expert_parallel=1")
    order: list[str] = []
    for name, p in trainer.engine.params.items():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    trainer.run()
    count = len(trainer.engine.params)
    if trainer.topology.rank == 0:
        print("RESULT " + json.dumps([order[:count], order[count:]]), flush=True)
    trainer.close()
    topology.disconnect()
    topology.leave(0)


if __name__ == "__main__":
    main()
