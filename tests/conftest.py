"""For all tests: one thread each, Ctrl-C as a terminal has it, which tests are slow, and which come first."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # side by side, threads that wait for each other take the others' cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for CUDA, on a CPU; Triton asks when it is imported

import pytest  # noqa: E402

# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ["launchers/test_pipeline", "distributed/test_routers", "distributed/test_topologies",
           "distributed/test_failures", "distributed/test_train", "benchmarks/test_scaling", "launchers/test_train",
           "test_package"]  # fmt: skip
"""modules whose tests come first, so that none of them is still running when all others are done"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder where every user may go; pytest's are their owner's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def slow(item: pytest.Function) -> bool:
    """Whether it is in a file that starts processes: `make test-fast` leaves it out."""
    starts = any(getattr(value, "__module__", None) == "tests.launch" for value in vars(item.module).values())
    return starts or "distributed" in item.path.parts


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with slow tests first, so that the others fill what is left at the end."""
    place = {}
    for item in items:
        module = item.nodeid.split("::")[0]
        longest = [i for i, name in enumerate(LONGEST) if module == f"tests/{name}.py"]
        place[item] = longest[0] if longest else len(LONGEST) + (not slow(item))
        if slow(item):
            item.add_marker("slow")
    items.sort(key=place.__getitem__)
