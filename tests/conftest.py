"""For all tests: one thread each, Ctrl-C as a terminal has it, which tests are slow, and which come first."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # side by side, threads that wait for each other take the others' cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for CUDA, on a CPU; Triton asks when it is imported
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else all that compile start processes that import torch

import pytest  # noqa: E402

# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ["distributed/test_topologies", "models/test_compiled", "distributed/test_train", "launchers/test_pipeline",
           "benchmarks/test_gpu_visit", "distributed/test_routers", "test_package", "launchers/test_train",
           "distributed/test_scores", "distributed/test_learning_rate", "distributed/test_failures"]  # fmt: skip
"""modules whose tests come first, so that none of them is still running when all others are done"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder where every user may go; pytest's are their owner's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def starts_jobs(item: pytest.Function) -> bool:
    """Whether it is in a file that does: `make test-fast` leaves those out, and what is marked by hand."""
    starts = any(getattr(value, "__module__", None) == "tests.launch" for value in vars(item.module).values())
    return starts or "distributed" in item.path.parts


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with slow tests first, so that the others fill what is left at the end."""
    for item in items:
        if starts_jobs(item):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = [Path(__file__).parent / f"{name}.py" for name in LONGEST]
    place = {path: len(longest) + (path not in slow) for path in {item.path for item in items}}
    place |= {path: i for i, path in enumerate(longest)}
    items.sort(key=lambda item: place[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays: else every collection of garbage looks through it, a third of a second each time."""
    gc.freeze()
