#!/usr/bin/env bash
# pytest 9.2.0: monkeypatch.setattr on a setting of torch (torch._dynamo.config, torch._inductor.config and the like) deletes
# the setting at the end of the test, where 9.1 puts the value back. torch keeps settings out of the module's __dict__, which
# is where pytest 9.2 looks for what to put back. The test itself passes; the next one in this process that compiles fails
# with an AttributeError from inside torch. torch's own config.patch(...) restores by itself.
#
# Seen with torch 2.13.0, Python 3.11, on a CPU; a test that sets, one that reads the setting, one that compiles:
#   pytest 9.1.1: 3 passed
#   pytest 9.2.0: 2 failed, 1 passed
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy
cat >"$folder/test_settings.py" <<'PYTHON'
import torch
import torch._dynamo.config as settings


def compiles():
    torch._dynamo.reset()
    return torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).sum() == 4


def test_sets(monkeypatch):
    monkeypatch.setattr(settings, "recompile_limit", 3)
    assert compiles()


def test_after():
    assert settings.recompile_limit == 8


def test_compiles_after():
    assert compiles()
PYTHON
changed=0
while read -r version expected; do
    install "pytest==$version"
    seen=$("$folder/venv/bin/python" -m pytest -q "$folder/test_settings.py" | tail -n 1 | sed 's/ in .*//') || true
    echo "pytest $version: $seen"
    [[ $seen == "$expected" ]] || changed=1
done <<'TABLE'
9.1.1 3 passed
9.2.0 2 failed, 1 passed
TABLE
exit "$changed"
