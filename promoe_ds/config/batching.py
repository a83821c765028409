"""What must divide: the global batch over ranks and accumulation steps, the ranks over expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def batch_plan(config: Config, world: int) -> tuple[int, int]:
    """(images per rank per forward, accumulation steps), whose product with `world` is the global batch.

    Raises:
        ConfigError: the global batch does not divide.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % world:
        unit = world * (micro or 1)
        near = listed(n for n in (total // unit * unit, (total // unit + 1) * unit) if n)
        way_out = f"choose for example {near}, or another number of processes"
        reject("train.global_batch_size", total, f"is not divisible by the world size {world}", way_out)
    if micro is None:
        return total // world, 1
    if total % (world * micro):
        conflict = f"train.global_batch_size={total} is not a multiple of micro batch * world size = {micro} * {world}"
        reject("train.micro_batch_size", micro, conflict, f"choose one of {listed(divisors(total // world))}")
    return micro, total // (world * micro)


def check_topology(config: Config, world: int) -> None:
    """Check what depends on the number of processes: ep divides it, the batch divides. Raises `ConfigError`."""
    ep = config.parallel.expert_parallel
    if world < 1:
        reject("world size", world, "is not a number of processes", "choose 1 or more")
    if world % ep:
        experts = config.moe.num_experts if config.moe else 1
        choices = listed(d for d in divisors(experts) if world % d == 0)
        way_out = f"choose one of {choices}, or a multiple of {ep} processes"
        reject("parallel.expert_parallel", ep, f"does not divide the world size {world}", way_out)
    batch_plan(config, world)
