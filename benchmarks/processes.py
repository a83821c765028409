"""Wait for jobs. Waits end after silence, not because work takes long: machines differ tenfold."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 600.0
"""seconds without a sign of life after which a job counts as hung"""


def wait_until(true: Callable[[], T], sign: Callable[[], object] = lambda: None, what: Callable[[], object] = str) -> T:
    """Poll until `true()` is, and return what it gave.

    Args:
        sign: changes as long as work goes on, such as the length of an output.
        what: gives the text of the error.

    Raises:
        AssertionError: after PATIENCE seconds in which `sign()` did not change.
    """
    last, since = sign(), time.monotonic()
    while not (found := true()):
        polled = time.monotonic()
        if (now := sign()) != last:
            last, since = now, polled
        assert polled - since < PATIENCE, f"{PATIENCE:.0f} s without a sign of life: {what()}"
        time.sleep(max(0.01, 3 * (time.monotonic() - polled)))  # asking must not slow down what is asked for
    return found


def free_port() -> int:
    """A port of this machine, outside the range that connections take theirs from before a job has come to use it."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
