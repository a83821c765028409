#!/usr/bin/env bash
# TensorBoard: a writer that resumes with purge_step=N says that all from step N on is void. TensorBoard's fast reader, which it takes
# by default where it can (--load_fast=auto), does not hear it: a curve loses its void points only when it gets a new one at or
# below their step. So scores and pictures of steps that the run gave up stay among the others until they are made again, and for
# good if those steps are passed at another interval. --load_fast=false, and EventAccumulator, drop them at once.
#
# A run of 10 steps, with FID at 5 and 10, is resumed from step 6, and stopped at 8; another goes on at other intervals, with FID and
# loss at 12 alone. Seen with TensorBoard 2.21.0 and its data server 0.7.2, torch 2.13.0, Python 3.11:
#                                   fast                                  --load_fast=false
#   resumed, loss                   1 2 3 4 5 6 7 8                       1 2 3 4 5 6 7 8
#   resumed, FID                    5 10                                  5
#   other intervals, loss           1 2 3 4 5 6 7 8 9 10 12               1 2 3 4 5 6 12
#   other intervals, FID            5 10 12                               5 12
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy tensorboard==2.21.0 tensorboard-data-server==0.7.2
cat >"$folder/purge.py" <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

folder = Path(sys.argv[1])


def write(run, losses, scores, purge):
    writer = SummaryWriter(str(folder / "logs" / run), purge_step=purge)
    for step in losses:
        writer.add_scalar("loss", 1 / step, step)
    for step in scores:
        writer.add_scalar("FID", 100 / step, step)
    writer.close()
    time.sleep(1.1)  # files are read in the order of their names, which hold seconds


for run in ("resumed", "other intervals"):
    write(run, range(1, 11), (5, 10), 1)
write("resumed", (7, 8), (), 7)
write("other intervals", (12,), (12,), 7)


def shown(fast):
    """Steps by run and tag, as the page of a TensorBoard of our own gets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(folder / "venv/bin/tensorboard"), "--logdir", str(folder / "logs"), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port), f"--load_fast={fast}"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(1)
            try:
                return {
                    (run, tag): [point[1] for point in ask(port, run, tag)]
                    for run in ("resumed", "other intervals")
                    for tag in ("loss", "FID")
                }
            except (urllib.error.URLError, ConnectionError):
                pass  # not up, or the runs are not read yet
        raise SystemExit("no answer")
    finally:
        server.terminate()
        server.wait()


def ask(port, run, tag):
    place = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run={run.replace(' ', '%20')}&tag={tag}"
    with urllib.request.urlopen(place, timeout=10) as answer:
        return json.load(answer)


BEFORE = [1, 2, 3, 4, 5, 6]
SEEN = {
    ("resumed", "loss"): ([*BEFORE, 7, 8], [*BEFORE, 7, 8]),
    ("resumed", "FID"): ([5, 10], [5]),
    ("other intervals", "loss"): ([*BEFORE, 7, 8, 9, 10, 12], [*BEFORE, 12]),
    ("other intervals", "FID"): ([5, 10, 12], [5, 12]),
}
fast, slow = shown("true"), shown("false")
for key in SEEN:
    print(f"{key[0]}, {key[1]}: fast {fast[key]}, --load_fast=false {slow[key]}")
raise SystemExit(any((fast[key], slow[key]) != seen for key, seen in SEEN.items()))
PYTHON
"$folder/venv/bin/python" "$folder/purge.py" "$folder" 2>/dev/null
