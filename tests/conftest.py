"""For all tests: one thread each, Ctrl-C as a terminal has it, and which tests are slow."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # side by side, threads that wait for each other take the others' cores

import pytest  # noqa: E402

# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Tests in a file that starts processes are slow, too: `make test-fast` leaves them out."""
    for item in items:
        starts = any(getattr(value, "__module__", None) == "tests.launch" for value in vars(item.module).values())
        if starts or "distributed" in item.path.parts:
            item.add_marker("slow")
