#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist loadgroup sends the tests of a group to any worker, so that tests which share
# a GPU, a port or a process group run side by side. xdist writes the group into the private attribute (_nodeid) of which
# pytest made a test's id, and pytest 9.2 makes it of another. Nothing is said. --dist loadfile works.
#
# Seen with pytest-xdist 3.8.0, Python 3.11:
#   pytest 9.1.0: 12 tests of one group on 1 of 3 workers
#   pytest 9.2.0: 12 tests of one group on 3 of 3 workers
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
cat >"$folder/test_group.py" <<'PYTHON'
import os

import pytest


@pytest.mark.parametrize("number", range(12))
@pytest.mark.xdist_group("gpu")
def test_one(number):
    with open(os.environ["WORKERS"], "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
PYTHON
export WORKERS="$folder/workers"
changed=0
while read -r version expected; do
    install "pytest==$version" pytest-xdist==3.8.0
    rm -f "$WORKERS"
    "$folder/venv/bin/python" -m pytest -q --numprocesses 3 --dist loadgroup "$folder/test_group.py" >/dev/null
    workers=$(sort -u "$WORKERS" | wc -l)
    echo "pytest $version: 12 tests of one group on $workers of 3 workers"
    [[ $expected == "one" && $workers == 1 || $expected == "several" && $workers != 1 ]] || changed=1
done <<'TABLE'
9.1.0 one
9.2.0 several
TABLE
exit "$changed"
