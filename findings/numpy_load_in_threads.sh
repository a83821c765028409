#!/usr/bin/env bash
# Several threads that read valid .npy files by `numpy.load` now and then get a SystemError on Python 3.11: numpy parses a file's
# header with `ast.literal_eval`, and that Python keeps one count of the parser's depth for all threads (python/cpython#106905).
# Two threads of different depth collide where making a syntax tree starts the garbage collector and that runs Python code, as
# finalizers do. Rare in a program (seen once in a sampler whose eight threads read its packs); here the collector and the change
# of threads are made frequent. Python 3.10.13, 3.12.1 and 3.13.0 gave none.
#
# Seen with numpy 2.4.6; 8 threads, 40,000 reads:
#   SystemError: AST constructor recursion depth mismatch, 1,634 times on Python 3.11.2, 2,379 times on 3.11.7
#   the same reads, each repeated after such an error: all 40,000 files
# Exits with 1 if that changes on Python 3.11.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import gc
import io
import sys
import threading

import numpy as np

stream, errors, read = io.BytesIO(), [], []
np.save(stream, np.zeros((4, 8, 8), np.float32))


class Garbage:
    def __init__(self):
        self.itself = self

    def __del__(self):
        sum(range(20))


def load(again):
    while True:
        try:
            np.load(io.BytesIO(stream.getvalue()))
            return True
        except SystemError as error:
            errors.append(str(error).partition(" (")[0])
            if not again:
                return False


def work(depth, again):
    if depth:
        return work(depth - 1, again)
    for _ in range(5000):
        Garbage()
        if load(again):
            read.append(1)


def files(again):
    read.clear()
    threads = [threading.Thread(target=work, args=(depth, again)) for depth in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(read)


sys.setswitchinterval(1e-6)
gc.set_threshold(10)
version = sys.version.split()[0]
lost = 40_000 - files(again=False)
print(f"numpy {np.__version__}, Python {version}: {lost} of 40,000 reads failed: {set(errors)}")
whole = files(again=True)
print(f"repeated after an error: {whole:,} files")
wanted = {"AST constructor recursion depth mismatch"} if sys.version_info[:2] == (3, 11) else set()
sys.exit(set(errors) != wanted or bool(lost) != bool(wanted) or whole != 40_000)
PYTHON
