"""Expert-parallel groups of ranks, and the process group of a job: made, watched over, left together."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from promoe_ds.parallel import rendezvous
from promoe_ds.parallel.watchdog import Watchdog, is_consequence
from promoe_ds.utils.ranks import Ranks

_watchdog: Watchdog | None = None


@dataclass(frozen=True)
class Topology(Ranks):
    """Ranks in groups of `ep` that hold the routed experts together: consecutive ranks, so they stay inside a node."""

    ep: int = 1

    @staticmethod
    def of(ranks: Ranks, ep: int) -> Topology:
        return Topology(ranks.rank, ranks.world, ranks.local_rank, ep)

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    def ep_groups(self) -> list[list[int]]:
        return [list(range(start, start + self.ep)) for start in range(0, self.world, self.ep)]


def connect(ranks: Ranks, timeout_minutes: float = 30.0, meeting_minutes: float | None = None) -> None:
    """Make the process group, gloo on CPU, NCCL on CUDA, and give it to DeepSpeed.

    The timeout is that of every group that DeepSpeed or we make from it, and of the first meeting of the ranks unless
    `meeting_minutes` says otherwise. Raises ConfigError where they cannot meet.

    From here on the end of one rank ends all (`watchdog`): within moments if its process or machine is gone, within the
    timeout if it stands still, alone in or out of a collective.

    DeepSpeed would first ask for each of its operators whether it can be compiled, which starts compilers, and on a CPU
    compile a shared-memory one for a minute (it serves inference only, and parallel jobs race for its build folder):
    none is marked as available. What uses an operator, as offload does, compiles it without asking.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world), ("LOCAL_RANK", ranks.local_rank)):
        os.environ.setdefault(name, str(value))
    global _watchdog
    import deepspeed
    from deepspeed.comm import comm

    if torch.distributed.is_initialized():
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]  # reading it would ask
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.device)
    cuda, timeout = ranks.device.type == "cuda", datetime.timedelta(minutes=timeout_minutes)
    rendezvous.join(
        "nccl" if cuda else "gloo",
        ranks,
        timeout_minutes,
        timeout_minutes if meeting_minutes is None else meeting_minutes,
        ranks.device if cuda and ranks.world > 1 else None,
    )
    deepspeed.init_distributed(verbose=False)
    # torch's groups do not inherit the timeout, and DeepSpeed names none
    comm.cdb.new_group = functools.partial(torch.distributed.new_group, timeout=timeout)
    if ranks.world > 1:
        speaker = ranks.local_rank == 0 or ranks.rank == 1  # some process of every machine but rank 0 itself
        host, seconds = os.environ["MASTER_ADDR"], 60 * timeout_minutes
        _watchdog = Watchdog(ranks.rank, lambda value: ranks.gather(value)[0], host, seconds, speaker)


def watched() -> bool:
    """Whether other ranks will learn of this one's end."""
    return _watchdog is not None


def fail(text: str, code: int, ranks: Ranks) -> int:
    """This rank cannot go on: end all ranks with `code`, and with one line on stderr, from rank 0.

    If several ranks fail at about the same time, the likeliest cause is told, and its code is that of every rank.
    Returns `code` if the process is the only one.
    """
    if _watchdog is not None:
        _watchdog.failed(text, code)
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code if ranks.world == 1 else leave(code)


def crash(error: Exception, ranks: Ranks) -> int:
    """`fail` with an error that nobody foresaw: its traceback too, unless it looks like an echo of another rank's."""
    text = f"rank {ranks.rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if ranks.world == 1 or not is_consequence(text):
        traceback.print_exception(error)
    return fail(text, 1, ranks)


def disconnect() -> None:
    """Leave the process group, together: gloo aborts a rank whose peers close their connections before it does."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if _watchdog is not None:
            _watchdog.close()
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process of several at once, flushed but without destructors.

    At interpreter exit gloo's threads now and then abort a rank ("terminate called without an active exception"), which
    would turn a finished run into a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place, not differentiable."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(x)
    return x
