"""Watchdogs of several ranks in one process; instead of ending it, they note what they would have done."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.processes import PATIENCE, wait_until
from promoe_ds.parallel import watchdog
from promoe_ds.parallel.watchdog import Watchdog

pytestmark = pytest.mark.slow  # starts processes


class Team:
    """Watchdogs of `world` ranks and the (code, text) with which each would have left."""

    def __init__(self, world: int, timeout: float = 60.0):
        self.ends: dict[int, tuple[int, str]] = {}
        self.address: Any = None
        self.dogs = [
            Watchdog(rank, self.share, "127.0.0.1", timeout, rank == 1, lambda *end, r=rank: self.leave(r, end))
            for rank in range(world)
        ]
        time.sleep(0.2)  # let everybody say hello

    def share(self, value: Any) -> Any:
        self.address = value or self.address
        return self.address

    def leave(self, rank: int, end: Any) -> None:
        self.ends.setdefault(rank, end)

    def vanish(self, rank: int) -> None:
        """What the others see of a process that dies."""
        hub = self.dogs[rank].hub
        assert hub
        hub.connection.shutdown(socket.SHUT_RDWR)

    def wait(self, ranks: set[int]) -> None:
        wait_until(lambda: ranks <= self.ends.keys(), what=lambda: self.ends)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "VERDICT_SECONDS", 5.0)


def in_threads(*work: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=w) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_silent_death_is_the_cause_of_broken_collectives() -> None:
    team = Team(4)
    team.vanish(2)
    broken = "failed: RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"
    in_threads(*(lambda r=r: team.dogs[r].failed(f"rank {r} {broken}") for r in (0, 1, 3)))
    team.wait({0, 1, 3})
    code, text = team.ends[0]
    assert code == 1 and text.startswith("rank 2 (") and "died without a word" in text
    assert team.ends[1] == team.ends[3] == (1, "")


def test_an_error_with_a_cause_of_its_own_comes_first_and_gives_its_exit_code() -> None:
    team = Team(3)
    in_threads(
        lambda: team.dogs[1].failed("rank 1 failed: RuntimeError: NCCL communicator was aborted"),
        lambda: team.dogs[2].failed("rank 2: data.path=x.png: is damaged; mend it", 2),
    )
    team.wait({0, 1, 2})
    assert team.ends == {0: (2, "rank 2: data.path=x.png: is damaged; mend it"), 1: (2, ""), 2: (2, "")}


def test_the_death_of_rank_0_is_told_once_a_machine() -> None:
    team = Team(3)
    for rank in (1, 2):
        team.vanish(rank)  # to these two, rank 0 is gone
    team.wait({1, 2})
    named = f"rank 0 ({socket.gethostname()}, pid {os.getpid()}) died without a word"
    assert team.ends[1][0] == 1 and team.ends[1][1].startswith(named)
    assert team.ends[2] == (1, "")


def test_a_rank_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        watchdog.Peer,
        "send",  # rank 0 goes on beating: else rank 1 misses it as well, and may leave first
        lambda peer, *message: None if message == ("beat",) and peer.rank == 0 else send(peer, *message),
    )
    team = Team(2, timeout=1.0)
    team.wait({0})
    assert "rank 1 (" in team.ends[0][1] and "has not been heard of for 1 s" in team.ends[0][1]


send = watchdog.Peer.send

RANK = """
import sys, time
from promoe_ds.parallel.watchdog import Watchdog
def share(address):  # over the pipes to the test
    if address:
        print(*address, flush=True)
        return address
    port, token = sys.stdin.readline().split()
    return int(port), token
Watchdog(int(sys.argv[1]), share, "127.0.0.1", 2.0)
print("watched", flush=True)
time.sleep(3600)
"""


def test_a_job_that_was_suspended_goes_on_and_is_watched_as_before() -> None:
    """Real processes, stopped for longer than the timeout: nobody is missing. Then one stays stopped."""
    pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "stderr": -1, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank)], **pipes) for rank in (0, 1)]
    try:
        ranks[1].stdin.write(ranks[0].stdout.readline())  # type: ignore[union-attr]
        ranks[1].stdin.flush()  # type: ignore[union-attr]
        assert all(rank.stdout.readline() == "watched\n" for rank in ranks)  # type: ignore[union-attr]
        time.sleep(0.5)
        for number, seconds in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 1.8)):
            for rank in ranks:
                rank.send_signal(number)
            time.sleep(seconds)
        assert [rank.poll() for rank in ranks] == [None, None]
        ranks[1].send_signal(signal.SIGSTOP)
        _, text = ranks[0].communicate(timeout=PATIENCE)
        assert ranks[0].returncode == 1 and text.startswith("error: rank 1 (") and "heard of for 2 s" in text
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_beats_keep_ranks_alive_and_farewells_are_no_deaths() -> None:
    team = Team(3, timeout=0.6)
    assert team.dogs[0].server
    with socket.create_connection(("127.0.0.1", team.dogs[0].server.getsockname()[1])) as stranger:
        stranger.sendall(b'["failed", "rank 1 failed: a lie", 1]\n')
        time.sleep(1.2)
    in_threads(*(dog.close for dog in team.dogs))
    assert not team.ends and not any(dog.thread.is_alive() for dog in team.dogs)


def test_a_beat_is_not_answered_by_a_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the two sides answer each other without end, thousands of times a second."""
    sent: list[Any] = []
    monkeypatch.setattr(watchdog.Peer, "send", lambda peer, *message: (sent.append(message), send(peer, *message)))
    start = time.monotonic()
    team = Team(3, timeout=4.0)  # a beat a second
    time.sleep(1.5)
    in_threads(*(dog.close for dog in team.dogs))
    beats = sent.count(("beat",))
    assert 4 <= beats <= 4 * (time.monotonic() - start + 2) and not team.ends


STRANGE = [b"5\n", b"{}\n", b"[]\n", b'["hello"]\n', b"[" * 5000 + b"\n", b"GET / HTTP/1.1\r\n\r\n"]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_whatever_a_stranger_sends_the_watch_goes_on(text: bytes) -> None:
    team = Team(2)
    assert team.dogs[0].server
    with socket.create_connection(("127.0.0.1", team.dogs[0].server.getsockname()[1])) as stranger:
        stranger.sendall(text)
        stranger.settimeout(PATIENCE)
        assert stranger.recv(64) == b""
    assert team.dogs[0].thread.is_alive() and not team.ends
    in_threads(*(dog.close for dog in team.dogs))


def test_a_hub_that_cannot_be_reached_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    lonely = Watchdog(1, lambda value: (port, "token"), "127.0.0.1", 60.0)
    assert "rank 1 cannot reach rank 0" in capsys.readouterr().err
    lonely.failed("rank 1 failed")  # returns at once: the caller leaves by itself
    lonely.close()
