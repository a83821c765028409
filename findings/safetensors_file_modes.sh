#!/usr/bin/env bash
# safetensors 0.8: save_file makes files that only their owner can read, and safe_open calls files missing that are there.
#
# With umask 022, where open(), numpy.save and torch.save give 0644 (seen on Linux, Python 3.11):
#
#   safetensors | new file | over an existing file of mode 0644
#   0.6.2       | 0644     | 0644, the same file
#   0.7.0       | 0644     | 0644, the same file
#   0.8.0       | 0600     | 0600, another file: a temporary one of mode 0600 is renamed over it
#
# From 0.8 on neither the umask nor the mode of an existing file decides: only chmod after writing does.
#
# safe_open turns every error of opening into FileNotFoundError, in all of them: for a file without permission to read
# it, and, as shown here because it holds for root too, for a link to itself, of which open() says ELOOP.
#
# Exits with 0 if all of this still holds.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
umask 022
cat >"$folder/check.py" <<'PYTHON'
import os
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

new, old, link = (Path(sys.argv[1]) / name for name in ("new", "old", "link"))
for path in (new, old, link):
    path.unlink(missing_ok=True)
old.touch(0o644)
before = old.stat().st_ino
for path in (new, old):
    save_file({"a": np.zeros(3)}, path)
modes = [f"{path.stat().st_mode & 0o777:04o}" for path in (new, old)]
same = old.stat().st_ino == before
link.symlink_to(link)
try:
    link.open("rb")
    said = ""
except OSError as error:
    said = os.strerror(error.errno)
try:
    safetensors.safe_open(link, "numpy")
    heard = ""
except Exception as error:
    heard = type(error).__name__
print(safetensors.__version__, *modes, "same" if same else "another", f"open: {said}; safe_open: {heard}", flush=True)
sys.exit([*modes, same, heard] != [*sys.argv[2:4], sys.argv[4] == "same", "FileNotFoundError"])
PYTHON
while read -r version new over same; do
    install "safetensors==$version" "numpy==2.2.6"
    "$folder/venv/bin/python" "$folder/check.py" "$folder" "$new" "$over" "$same"
done <<'TABLE'
0.6.2 0644 0644 same
0.7.0 0644 0644 same
0.8.0 0600 0600 another
TABLE
