"""What must divide: the global batch over ranks and accumulation steps, the ranks over expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable

from promoe_ds.config.schema import Config, reject


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def batch_plan(config: Config, world: int) -> tuple[int, int]:
    """(images a rank a forward, accumulation steps), whose product with `world` is the global batch.

    Raises:
        ConfigError: the global batch does not divide.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % world:
        near = [total // world * world, (total // world + 1) * world]
        reject(
            "train.global_batch_size",
            total,
            f"is not divisible by the world size {world}",
            f"choose for example {listed(n for n in near if n)}, or another number of processes",
        )
    if micro is None:
        return total // world, 1
    if total % (world * micro):
        reject(
            "train.micro_batch_size",
            micro,
            f"train.global_batch_size={total} is not a multiple of micro batch * world size = {micro} * {world}",
            f"choose one of {listed(divisors(total // world))}",
        )
    return micro, total // (world * micro)


def check_topology(config: Config, world: int) -> None:
    """Check what depends on the number of processes: ep divides it, the batch divides. Raises `ConfigError`."""
    ep = config.parallel.expert_parallel
    if world < 1:
        reject("world size", world, "is not a number of processes", "choose 1 or more")
    if world % ep:
        experts = config.moe.num_experts if config.moe else 1
        choices = [d for d in divisors(experts) if world % d == 0]
        reject(
            "parallel.expert_parallel",
            ep,
            f"does not divide the world size {world}",
            f"choose one of {listed(choices)}, or a multiple of {ep} processes",
        )
    batch_plan(config, world)
