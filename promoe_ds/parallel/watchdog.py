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
import math
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
from typing import Any, NamedTuple, NoReturn

from promoe_ds.parallel import rendezvous
from promoe_ds.utils.files import parse_json

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


class Trouble(NamedTuple):
    """What is known of a rank's end; the smallest is the likeliest cause."""

    likelihood: int
    rank: int
    text: str
    code: int = 1

    @classmethod
    def told(cls, rank: int, text: str, code: int) -> Trouble:
        return cls(2 if is_consequence(text) else 0, rank, text, code)


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
            messages = [parse_json(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, list) and message for message in messages) else None

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


def _here() -> str:
    """What tells this process from others, for people."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


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
        share: collective; gives rank 0's value to every rank.
        host: where rank 0 can be reached.
        timeout: seconds without a beat after which a rank counts as lost.
        speaker: whether this process tells the end of rank 0 (one per machine, so that somebody does).
        leave: ends the process.
    """

    def __init__(
        self,
        rank: int,
        share: Callable[[Any], Any],
        host: str,
        timeout: float,
        speaker: bool = True,
        leave: Callable[[int, str], Any] = _leave,
    ):
        self.rank, self.timeout, self.speaker, self.leave = rank, timeout, speaker, leave
        self.closing = threading.Event()
        self.wake, self.woken = socket.socketpair()
        self.news: list[Trouble] = []
        self.server = rendezvous.listen(0) if rank == 0 else None
        port, self.token = share((self.server.getsockname()[1], secrets.token_hex(8)) if self.server else None)
        self.hub = None if self.server else self._dial(host, port)
        self.peers = {0: self.hub} if self.hub else {}
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def _dial(self, host: str, port: int) -> Peer | None:
        try:
            connection = socket.create_connection((host, port), timeout=30)
        except OSError as error:
            text = f"rank {self.rank} cannot reach rank 0 at {host}:{port} ({error})"
            print(f"warning: {text}: its end is noticed by timeout only", file=sys.stderr, flush=True)
            return None
        connection.settimeout(None)
        _keep_alive(connection)
        hub = Peer(connection, 0)
        hub.send("hello", self.token, self.rank, _here())
        return hub

    def failed(self, text: str, code: int = 1) -> None:
        """Say that this rank cannot go on, and wait to be ended; returns only if rank 0 gives no verdict."""
        if self.server:
            self.news.append(Trouble.told(self.rank, text, code))
        elif self.hub:
            self.hub.send("failed", text, code)
        self.wake.send(b"!")
        self.thread.join(VERDICT_SECONDS)

    def close(self) -> None:
        """Stop watching; every rank, after a barrier, so that nobody takes the closing for a death."""
        self.closing.set()
        self.wake.send(b"!")
        self.thread.join(5)

    def _run(self) -> None:
        """The thread: rank 0 watches all, the others watch rank 0, until the job ends or a rank is lost.

        Beats are sent by the clock: one that answered every message would be answered in turn, without end.
        """
        beat = min(BEAT_SECONDS, self.timeout / 4)
        next_beat, verdict, last = 0.0, math.inf, time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self.woken, selectors.EVENT_READ)
            if self.server:
                selector.register(self.server, selectors.EVENT_READ)
            if self.hub:
                selector.register(self.hub.connection, selectors.EVENT_READ, self.hub)
            while (self.server or self.peers) and not self.closing.is_set() and last < verdict:
                for key, _ in selector.select(max(0.0, min(next_beat, verdict) - time.monotonic())):
                    self._serve(key, selector)
                now = time.monotonic()
                # A pass takes a beat at most. If this thread was away for longer (SIGSTOP, a suspended job or machine),
                # silence proves nothing. Two beats that go unnoticed, and one that was due, stay below the timeout.
                away, last, due = now - last > 2 * beat, now, now >= next_beat
                next_beat = now + beat if due else next_beat
                for peer in self.peers.values():
                    if away:
                        peer.heard = now
                    if due:
                        peer.send("beat")
                    if now - peer.heard > self.timeout:
                        self._lost(peer, f"has not been heard of for {self.timeout:.0f} s")
                if self.news:
                    verdict = min(verdict, now + (SETTLE_SECONDS if self.server else 0.0))
        self._end()

    def _end(self) -> None:
        """Tell the others how it ended, and end this process too if a rank was lost."""
        worst = min(self.news, default=None)
        if self.server:
            self.server.close()
        for peer in self.peers.values():
            peer.send("verdict", worst.code) if worst else peer.send("bye")
            peer.connection.close()
        if worst:
            self.leave(worst.code, worst.text if self.server or self.speaker else "")

    def _lost(self, peer: Peer, how: str) -> None:
        name = f" ({peer.name})" if peer.name else ""
        if not self.closing.is_set():
            self._note(Trouble(1, peer.rank, f"rank {peer.rank}{name} {how}; {CONTINUE}"))

    def _note(self, trouble: Trouble) -> None:
        if all(other.rank != trouble.rank for other in self.news):
            self.news.append(trouble)

    def _serve(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
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
                self.peers[peer.rank] = peer
                if self.server:  # so that rank 0 has a name, too
                    peer.send("hello", self.token, 0, _here())
            elif peer.rank < 0:  # a stranger
                messages = None
                break
            elif kind == "failed":
                self._note(Trouble.told(peer.rank, *rest))
            elif kind == "verdict" and peer is self.hub:
                self._note(Trouble(0, 0, "", rest[0]))
            elif kind == "bye":
                self.peers.pop(peer.rank, None)
        if messages is None:
            selector.unregister(peer.connection)
            peer.connection.close()
            if self.peers.get(peer.rank) is peer:
                self._lost(peer, "died without a word (killed, out of memory, or its machine is lost)")
