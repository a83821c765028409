#!/usr/bin/env bash
# A folder without __init__.py that setuptools' package-dir maps below a package: the wheel has it, `pip install --editable` does not.
#
# setuptools 84.2.1 writes a finder that knows folders with __init__.py, and asks for the others through a placeholder in
# sys.path, where Python looks for top-level names alone. Seen:
#   wheel:                       outer.inner.tool imported
#   editable:                    ModuleNotFoundError: No module named 'outer.inner'
#   editable, with __init__.py:  outer.inner.tool imported
# Exits 1 if it is otherwise.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install setuptools==84.2.1

mkdir -p "$folder/project/outer" "$folder/project/elsewhere"
cd "$folder/project"
touch outer/__init__.py
echo 'print("outer.inner.tool imported")' >elsewhere/tool.py
cat >pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "outer"
version = "1"
[tool.setuptools]
packages = ["outer", "outer.inner"]
[tool.setuptools.package-dir]
"outer.inner" = "elsewhere"
TOML

try() { # try TITLE EXPECTED PIP-OPTION...: install the project so, import the mapped module from another folder
    local title=$1 expected=$2 seen
    shift 2
    install --no-build-isolation --force-reinstall "$@" .
    seen=$(cd / && "$folder/venv/bin/python" -c 'import outer.inner.tool' 2>&1 | tail -n 1) || true
    echo "$title: $seen"
    [ "$seen" = "$expected" ] || { echo "expected: $expected"; exit 1; }
}
try wheel "outer.inner.tool imported"
try editable "ModuleNotFoundError: No module named 'outer.inner'" --editable
touch elsewhere/__init__.py
try "editable, with __init__.py" "outer.inner.tool imported" --editable
