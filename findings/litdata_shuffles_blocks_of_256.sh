#!/usr/bin/env bash
# litdata: StreamingDataset(shuffle=True) puts chunks in another order and, within a chunk, blocks of 256 neighbours, so a batch of
# 256 holds images that were neighbours when the data was written. optimize() keeps the order of its inputs, and folders of classes
# come sorted: batches then have one to four classes, whatever the number of workers. item_shuffle_window="full" shuffles a whole
# chunk (64 MB by default, 7,766 of these latents), which is six or seven classes. Only inputs that are shuffled before optimize() give
# batches of all.
#
# 24,576 latents of 4 x 32 x 32 in half precision, 1,281 of each class as in ImageNet, so 20 classes, written in order. Classes per
# batch of 256, fewest, median and most of an epoch. Seen with litdata 0.2.76, torch 2.13.0, Python 3.11:
#                                              fewest  median  most
#   inputs in order, no workers                     1       2     4
#   inputs in order, 4 workers                      1       1     3
#   inputs in order, item_shuffle_window="full"     2       7    13
#   inputs shuffled before                         19      20    20
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy litdata==0.2.76
cat >"$folder/classes.py" <<'PYTHON'
import random
import sys
from statistics import median

import numpy as np
from litdata import StreamingDataLoader, StreamingDataset, optimize

IMAGES, PER_CLASS, BATCH = 24_576, 1_281, 256


def latent(index):
    """8 KB, as 4 x 32 x 32 in half precision."""
    return {"latent": np.full((4, 32, 32), index, np.float16), "label": index // PER_CLASS}


def classes(folder, workers, window):
    """Per batch of an epoch."""
    data = StreamingDataset(folder, shuffle=True, seed=1, drop_last=False, item_shuffle_window=window)
    return [len(set(batch["label"].tolist())) for batch in StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)]


if __name__ == "__main__":
    top = sys.argv[1]
    mixed = random.Random(0).sample(range(IMAGES), IMAGES)
    for name, inputs in (("sorted", list(range(IMAGES))), ("mixed", mixed)):
        optimize(latent, inputs, f"{top}/{name}", chunk_bytes="64MB", num_workers=1)
    seen = {
        ("sorted", 0, None): (1, 2, 4),
        ("sorted", 4, None): (1, 1, 3),
        ("sorted", 0, "full"): (2, 7, 13),
        ("mixed", 0, None): (19, 20, 20),
    }
    changed = False
    for (name, workers, window), expected in seen.items():
        found = classes(f"{top}/{name}", workers, window)
        few, usual, many = min(found), median(found), max(found)
        print(f"RESULT inputs {name}, {workers} workers, window {window}: {few} to {many} classes per batch, median {usual:g}")
        changed |= (few, usual, many) != expected
    raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/classes.py" "$folder" 2>&1 | sed -n "s/^RESULT //p"
