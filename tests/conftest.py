"""For all tests: one thread each, Ctrl-C as a terminal has it, which tests are slow, and who runs what beside whom."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # side by side, threads that wait for each other take the others' cores

import pytest  # noqa: E402

# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ["launchers/test_pipeline", "distributed/test_routers", "distributed/test_train", "distributed/test_failures",
           "benchmarks/test_scaling", "launchers/test_train", "test_package"]  # fmt: skip
"""modules whose tests come first, so that none of them is still running when all others are done"""


def slow(item: pytest.Function) -> bool:
    """Whether it is in a file that starts processes: `make test-fast` leaves it out."""
    starts = any(getattr(value, "__module__", None) == "tests.launch" for value in vars(item.module).values())
    return starts or "distributed" in item.path.parts


def shared_fixtures(item: pytest.Function) -> list[str]:
    """What it shares with other tests of its file; made once for each process that runs one of them."""
    module, defined = item.nodeid.split("::")[0], item._fixtureinfo.name2fixturedefs
    return [name for name, found in defined.items() if found[-1].scope == "module" and found[-1].baseid == module]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Slow tests first, each on its own unless it shares a fixture; the others, file by file, fill what is left."""
    place = {}
    for item in items:
        module = item.nodeid.split("::")[0]
        longest = [i for i, name in enumerate(LONGEST) if module == f"tests/{name}.py"]
        place[item] = longest[0] if longest else len(LONGEST) + (not slow(item))
        group = module
        if slow(item):
            item.add_marker("slow")
            group = f"{module} {' '.join(shared_fixtures(item))}" if shared_fixtures(item) else item.nodeid
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=place.__getitem__)
