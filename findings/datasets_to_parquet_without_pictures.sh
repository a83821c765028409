#!/usr/bin/env bash
# datasets: Dataset.to_parquet of a folder of pictures writes a Parquet file without any picture in it.
#
# The column `image` has `bytes` and `path`. Of pictures that were loaded from files (load_dataset("imagefolder"), or paths
# cast to Image) `bytes` is null and `path` is absolute, and to_parquet writes it as it is, with the features of an image
# data set. On the machine that wrote it the file loads and shows pictures, because the paths are followed; anywhere else
# it holds labels and names. save_to_disk of the same data set embeds the files. Before to_parquet they are embedded by
# datasets.table.embed_table_storage, in a `map` over the arrow format; `path` is then the bare name.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1, Python 3.11:
#   40 JPEGs, 123347 bytes in all
#   direct.parquet: 3141 bytes, 0 of 40 rows have bytes, the path is absolute, loads where the folder is: True, elsewhere: False
#   embedded.parquet: 137659 bytes, 40 of 40 rows have bytes, the path is 0.jpg, loads where the folder is: True, elsewhere: True
#   save_to_disk: 40 of 40 rows have bytes
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install datasets==5.2.0 pyarrow==26.0.1 pillow==13.0.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.table import embed_table_storage
from PIL import Image

draw, total = np.random.default_rng(0), 0
for label in ("cat", "dog"):
    os.makedirs(f"tree/{label}")
    for number in range(20):
        file = f"tree/{label}/{number}.jpg"
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        total += os.path.getsize(file)
pictures = load_dataset("imagefolder", data_dir="tree", split="train")
pictures.to_parquet("direct.parquet")
pictures.save_to_disk("saved")
arrow = pictures.with_format("arrow").map(embed_table_storage, batched=True)
arrow.with_format(None).to_parquet("embedded.parquet")


def loads(name):
    try:
        return Dataset.from_parquet(name, cache_dir=f"cache-{os.path.exists('tree')}-{name}")[0]["image"].size == (64, 64)
    except FileNotFoundError:
        return False


rows = {name: pq.read_table(name).column("image").to_pylist() for name in ("direct.parquet", "embedded.parquet")}
held = {name: sum(row["bytes"] is not None for row in rows[name]) for name in rows}
here = {name: loads(name) for name in rows}
os.rename("tree", "elsewhere")
there = {name: loads(name) for name in rows}
print(f"40 JPEGs, {total} bytes in all")
for name in rows:
    path = "absolute" if os.path.isabs(rows[name][0]["path"]) else rows[name][0]["path"]
    print(f"{name}: {os.path.getsize(name)} bytes, {held[name]} of 40 rows have bytes, the path is {path},",
          f"loads where the folder is: {here[name]}, elsewhere: {there[name]}")
saved = load_from_disk("saved").with_format("arrow")[:]["image"].to_pylist()
saved = sum(row["bytes"] is not None for row in saved)
print(f"save_to_disk: {saved} of 40 rows have bytes")
found = list(held.values()), list(here.values()), list(there.values()), saved
sys.exit(found != ([0, 40], [True, True], [False, True], 40))
PYTHON
