"""How the processes of a job meet: torch's default process group, or one line that says why there is none.

torch alone answers a taken port with pages of C++ frames, tries an unknown name until the timeout, and waits for ever
for a word from a stranger that holds the port. Here rank 0 takes the port itself and hands it to torch's store, every
rank makes sure that somebody listens before it asks torch, and torch's client is waited for no longer than agreed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import torch
import torch.distributed as dist

from promoe_ds.config.errors import reject
from promoe_ds.utils.ranks import Ranks

NAME_SECONDS = 5.0
"""how long a name that cannot be resolved is tried: name servers have moments, too"""
RETRY_SECONDS = 0.5
PORT_OPTIONS = "deepspeed --master_port, torchrun --master-port, or MASTER_PORT"
ADDRESS_OPTIONS = "deepspeed --master_addr, torchrun --master-addr, or MASTER_ADDR"
GRACE_SECONDS = 5.0
"""torch's own timeout comes first, and says more"""


def address(world: int) -> tuple[str, int]:
    """(host, port) where rank 0 waits for the others, by MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: one of them is missing, or the port is no port.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            conflict = f"WORLD_SIZE={world} processes cannot find each other without it"
            way_out = "start with deepspeed, torchrun or slurm/launch.sh, or export it"
            reject(f"environment {name}", "(not set)", conflict, way_out)
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) < 2**16):
        reject("environment MASTER_PORT", repr(port), "is no port", "choose a number from 1 to 65535")
    return host, int(port)


def join(
    backend: str,
    ranks: Ranks,
    minutes: float,
    meeting_minutes: float = 30.0,
    device: torch.device | None = None,
) -> None:
    """Make the default process group of torch; every process of the job, once.

    Args:
        backend: gloo or nccl.
        ranks: this process among them.
        minutes: timeout of its collectives.
        meeting_minutes: how long the processes wait for each other here.
        device: of this process, for a group that is bound to it (NCCL).

    Raises:
        ConfigError: they cannot meet: the port is taken, rank 0 has no address or does not listen, or some never came.
    """
    rank, world, timeout = ranks.rank, ranks.world, datetime.timedelta(minutes=minutes)
    if world == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device
        )
        return
    host, port = address(world)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens
    listener = _take(port, where) if rank == 0 and not served else None
    _reach(host, port, where, meeting_minutes)
    try:
        store = _store(host, port, world, listener, meeting_minutes)
        store.set_timeout(timeout)
        if served and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # the store keeps the addresses of ranks that died; several nodes may count their starts differently
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
    except TimeoutError:
        conflict = f"what listens at {where} is not rank 0 of this job: it never answered"
        reject("environment MASTER_PORT", port, conflict, f"choose another: {PORT_OPTIONS}")
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        conflict = f"not all came together at {where} ({reason})"
        reject("environment WORLD_SIZE", world, conflict, "start all, each job on a port of its own")


@contextlib.contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Inside, the processes can talk (gloo, without DeepSpeed).

    They join at the start, while they are close in time, and may then be a day apart. Raises ConfigError where they
    cannot meet.
    """
    if ranks.world == 1:
        yield
        return
    join("gloo", ranks, minutes=24 * 60)
    try:
        yield
    finally:
        dist.destroy_process_group()


def listen(port: int) -> socket.socket:
    """A socket on every address of this machine; port 0 is any free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def _take(port: int, where: str) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        conflict = f"rank 0 cannot listen at {where} ({reason})"
        reject("environment MASTER_PORT", port, conflict, f"choose another: {PORT_OPTIONS}")


def _reach(host: str, port: int, where: str, minutes: float) -> None:
    """Return as soon as somebody listens there."""
    way_out = f"name the machine of rank 0: {ADDRESS_OPTIONS}"
    began, known = time.monotonic(), False
    while True:
        seconds = time.monotonic() - began
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except (OSError, UnicodeError) as error:
            known = known or not isinstance(error, socket.gaierror | UnicodeError)
            if not known and seconds > NAME_SECONDS:
                reject("environment MASTER_ADDR", host, f"the name in {where} has no address ({error})", way_out)
            if known and seconds > 60 * minutes:
                conflict = f"nobody listens at {where} for {minutes:g} minutes ({error})"
                reject("environment MASTER_ADDR", host, conflict, way_out)
        time.sleep(RETRY_SECONDS)


def _store(host: str, port: int, world: int, listener: socket.socket | None, minutes: float) -> dist.Store:
    """torch's store, made in a thread: its client would wait without end for a stranger's answer.

    Raises:
        TimeoutError: there was none.
    """
    made: Future[dist.Store] = Future()

    def make() -> None:
        try:
            fd = listener.detach() if listener else None
            timeout = datetime.timedelta(minutes=minutes)
            made.set_result(dist.TCPStore(host, port, world, fd is not None, timeout, master_listen_fd=fd))
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=make, name="rendezvous", daemon=True).start()
    return made.result(60 * minutes + GRACE_SECONDS)
