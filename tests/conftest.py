"""For all tests: Ctrl-C as a terminal has it, and which tests are slow."""

import signal

import pytest

# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Tests in a file that starts processes are slow, too: `make test-fast` leaves them out."""
    for item in items:
        starts = any(getattr(value, "__module__", None) == "tests.launch" for value in vars(item.module).values())
        if starts or "distributed" in item.path.parts:
            item.add_marker("slow")
