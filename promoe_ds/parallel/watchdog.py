"""The end of one rank ends all, soon and with one message that names it, whatever the launcher does.

Rank 0 keeps a TCP connection with every other rank, beside the collectives. A process that dies closes its connection
at once; the kernel's keep-alive notices a lost machine; a process that is stopped or out of reach misses its beats. A
watchdog that stood still itself (the job was suspended) forgives the beats that it cannot have heard. A rank that fails
says why before it leaves. Rank 0 waits a moment for related news, since a failure makes the collectives of other ranks
fail too, tells the likely cause, and every rank leaves with the same exit code.

Messages are lines of JSON, [kind, ...]: hello (token, rank, what to call it), beat, failed (text, code), bye, and from
rank 0 beat, bye and verdict (code).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from promoe_ds.parallel import rendezvous

BEAT_SECONDS = 5.0
"""between signs of life; less if the timeout is short"""
SETTLE_SECONDS = 1.0
"""from the first sign of trouble to the verdict"""
VERDICT_SECONDS = 30.0
"""how long a rank that failed waits for the verdict"""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
"""a machine that vanishes is noticed after 25 s (seconds, seconds, probes, milliseconds)"""
CONTINUE = "the same command continues from the last checkpoint"
CONSEQUENCE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|by peer|timed? ?out", re.IGNORECASE)
"""errors of a collective: more likely the effect of another rank's end than its cause"""


def is_consequence(text: str) -> bool:
    """Whether an error looks like the effect of another rank's end on a collective."""
    return CONSEQUENCE.search(text) is not None


@dataclass(order=True)
class Trouble:
    """What is known of a rank's end; the smallest is the likeliest cause."""

    likelihood: int
    rank: int
    text: str = field(compare=False)
    code: int = field(default=1, compare=False)

    @classmethod
    def told(cls, rank: int, text: str, code: int) -> Trouble:
        return cls(2 if is_consequence(text) else 0, rank, text, code)

    @classmethod
    def silent(cls, rank: int, name: str, how: str) -> Trouble:
        return cls(1, rank, f"rank {rank} ({name}) {how}; {CONTINUE}")


@dataclass
class Peer:
    """A connection, and what has arrived on it."""

    connection: socket.socket
    rank: int = -1
    name: str = ""
    heard: float = field(default_factory=time.monotonic)
    buffer: bytes = b""

    def receive(self) -> list[list[Any]] | None:
        """Whole messages that have arrived; None if the other side is gone."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, list) and message for message in messages) else None

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _leave(code: int, text: str = "") -> NoReturn:
    """End the process from a thread: the main one may be in a collective that never ends."""
    if text:
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


class Watchdog:
    """One per process of a job of several.

    Args:
        rank: of this process.
        world: number of processes.
        share: collective; gives rank 0's value to every rank.
        host: where rank 0 can be reached.
        timeout: seconds without a beat after which a rank counts as lost.
        speaker: whether this process tells the end of rank 0 (one per machine, so that somebody does).
        leave: ends the process.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        share: Callable[[Any], Any],
        host: str,
        timeout: float,
        speaker: bool = True,
        leave: Callable[[int, str], Any] = _leave,
    ):
        self.rank, self.world, self.timeout, self.speaker, self.leave = rank, world, timeout, speaker, leave
        self.beat = min(BEAT_SECONDS, timeout / 4)
        self.closing, self.since, self.next_beat = threading.Event(), 0.0, 0.0
        self.last_pass = time.monotonic()
        self.wake, self.woken = socket.socketpair()
        self.news: list[Trouble] = []
        self.server = rendezvous.listen(0) if rank == 0 else None
        port, self.token = share((self.server.getsockname()[1], secrets.token_hex(8)) if self.server else None)
        self.hub = None if self.server else self._dial(host, port)
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def _dial(self, host: str, port: int) -> Peer | None:
        try:
            connection = socket.create_connection((host, port), timeout=30)
        except OSError as error:
            text = (
                f"rank {self.rank} cannot reach rank 0 at {host}:{port} ({error}): its end is noticed by timeout only"
            )
            print(f"warning: {text}", file=sys.stderr, flush=True)
            return None
        connection.settimeout(None)
        _keep_alive(connection)
        hub = Peer(connection, 0, "")
        hub.send("hello", self.token, self.rank, f"{socket.gethostname()}, pid {os.getpid()}")
        return hub

    # ------------------------------------------------------------------------------------------- from the main thread

    def failed(self, text: str, code: int = 1) -> None:
        """Say that this rank cannot go on, and wait to be ended; returns only if rank 0 gives no verdict."""
        if self.hub:
            self.hub.send("failed", text, code)
        self.news.append(Trouble.told(self.rank, text, code))
        self.wake.send(b"!")
        self.thread.join(VERDICT_SECONDS)

    def close(self) -> None:
        """Part in peace; every rank, after a barrier."""
        self.closing.set()
        self.wake.send(b"!")
        self.thread.join(5)

    # ---------------------------------------------------------------------------------------------------- the thread

    def _beat_is_due(self) -> bool:
        """Once in `beat` seconds: a beat that answered every message would be answered in turn, without end."""
        now = time.monotonic()
        due = now >= self.next_beat
        if due:
            self.next_beat = now + self.beat
        return due

    def _until_beat(self) -> float:
        return max(0.0, self.next_beat - time.monotonic())

    def _stood_still(self, now: float) -> bool:
        """Whether this thread itself was away since the last call: a pass of its loop takes a beat at most.

        If it was (SIGSTOP, a suspended job or machine), silence proves nothing about the others. Two beats of absence
        that go unnoticed, and a beat that was due, stay below the timeout of four.
        """
        gap, self.last_pass = now - self.last_pass, now
        return gap > 2 * self.beat

    def _run(self) -> None:
        if self.server:
            self._watch_all(self.server)
        elif self.hub:
            self._watch_hub(self.hub)

    def _watch_hub(self, hub: Peer) -> None:
        with selectors.DefaultSelector() as selector, hub.connection:
            selector.register(hub.connection, selectors.EVENT_READ)
            selector.register(self.woken, selectors.EVENT_READ)
            while not self.closing.is_set():
                if self._beat_is_due():
                    hub.send("beat")
                for key, _ in selector.select(self._until_beat()):
                    if key.fileobj is self.woken:
                        self.woken.recv(64)
                        continue
                    messages = hub.receive()
                    for kind, *rest in messages or ():
                        if kind == "bye":
                            return
                        if kind == "verdict":
                            self.leave(rest[0], "")
                            return
                    if messages is None:
                        return self._hub_is_gone("died without a word (killed, out of memory, or its machine is lost)")
                now = time.monotonic()
                if self._stood_still(now):
                    hub.heard = now
                if now - hub.heard > self.timeout:
                    return self._hub_is_gone(f"has not been heard of for {self.timeout:.0f} s")
            hub.send("bye")

    def _hub_is_gone(self, how: str) -> None:
        if not self.closing.is_set():
            self.leave(1, f"rank 0 {how}; {CONTINUE}" if self.speaker else "")

    def _watch_all(self, server: socket.socket) -> None:
        peers: dict[int, Peer] = {}
        with selectors.DefaultSelector() as selector, server:
            selector.register(server, selectors.EVENT_READ)
            selector.register(self.woken, selectors.EVENT_READ)
            while not self.closing.is_set():
                for key, _ in selector.select(self._until_beat() if not self.news else SETTLE_SECONDS / 10):
                    self._serve(key, selector, peers)
                now, due = time.monotonic(), self._beat_is_due()
                stood_still = self._stood_still(now)
                for peer in peers.values():
                    if stood_still:
                        peer.heard = now
                    if due:
                        peer.send("beat")
                    if now - peer.heard > self.timeout:
                        self._note(
                            Trouble.silent(peer.rank, peer.name, f"has not been heard of for {self.timeout:.0f} s")
                        )
                if self.news and self._settled(now):
                    break
        worst = min(self.news, default=None)
        for peer in peers.values():
            peer.send("verdict", worst.code) if worst else peer.send("bye")
            peer.connection.close()
        if worst:
            self.leave(worst.code, worst.text)

    def _settled(self, now: float) -> bool:
        self.since = self.since or now
        return now - self.since >= SETTLE_SECONDS

    def _note(self, trouble: Trouble) -> None:
        if all(other.rank != trouble.rank for other in self.news):
            self.news.append(trouble)

    def _serve(self, key: selectors.SelectorKey, selector: selectors.BaseSelector, peers: dict[int, Peer]) -> None:
        """One event: a connection, a wake-up, or messages of a peer."""
        if key.fileobj is self.woken:
            self.woken.recv(64)
            return
        if key.data is None:
            connection, _ = self.server.accept()  # type: ignore[union-attr]
            _keep_alive(connection)
            selector.register(connection, selectors.EVENT_READ, Peer(connection))
            return
        peer: Peer = key.data
        messages = peer.receive()
        for kind, *rest in messages or ():
            if kind == "hello" and rest[:1] == [self.token]:
                peer.rank, peer.name = rest[1], rest[2]
                peers[peer.rank] = peer
            elif peer.rank < 0:  # a stranger
                messages = None
                break
            elif kind == "failed":
                self._note(Trouble.told(peer.rank, *rest))
            elif kind == "bye":
                peers.pop(peer.rank, None)
        if messages is None:
            selector.unregister(peer.connection)
            peer.connection.close()
            if peers.get(peer.rank) is peer and not self.closing.is_set():
                self._note(Trouble.silent(peer.rank, peer.name, "died without a word (killed, or out of memory)"))
