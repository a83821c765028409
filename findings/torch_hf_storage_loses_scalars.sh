#!/usr/bin/env bash
# torch: HuggingFaceStorageWriter writes 0 for every tensor without dimensions when it consolidates, and raises nothing. The writer of
# torch.distributed.checkpoint, which torchtitan offers for Hugging Face's format, joins the ranks' files once all are written
# (enable_consolidation). A learned temperature or CLIP's logit_scale is 0 in the file that it makes, and 0 when it is loaded; the
# shards beside it are right. It also asks torch.finfo for the size of each dtype: a model with BatchNorm (num_batches_tracked), a
# boolean mask or a router's counts of tokens ends each save, after its shards, in CheckpointException from a TypeError about finfo
# (pytorch/pytorch#192485). Without consolidation all is well.
#
# Seen with torch 2.13.0, safetensors 0.8.0, Python 3.11, on a CPU:
#                     one file   consolidated
#   floats            equal      equal
#   a scalar          equal      no error, 0 instead of 0.5
#   BatchNorm1d       equal      CheckpointException, shards equal
#   a boolean mask    equal      CheckpointException, shards equal
#   an integer count  equal      CheckpointException, shards equal
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy safetensors==0.8.0
cat >"$folder/save.py" <<'PYTHON'
import tempfile
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import CheckpointException, load, save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

warnings.filterwarnings("ignore")
states = {
    "floats": {"w": torch.randn(4, 3), "half": torch.randn(5).bfloat16()},
    "a scalar": {"w": torch.randn(4, 3), "temperature": torch.tensor(0.5)},
    "BatchNorm1d": torch.nn.BatchNorm1d(3).state_dict(),
    "a boolean mask": {"w": torch.randn(2), "mask": torch.tensor([True, False])},
    "an integer count": {"w": torch.randn(2), "tokens": torch.tensor([3, 1])},
}


def attempt(state, consolidated):
    """Whether the save raised, and what lies on disk with other values."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"save_distributed": consolidated, "enable_consolidation": consolidated}
        try:
            save(dict(state), storage_writer=HuggingFaceStorageWriter(folder, **how), no_dist=True)
            place, raised = Path(folder), False
        except CheckpointException as error:
            assert "torch.finfo() requires a floating point input type" in str(error)
            place, raised = Path(folder) / "sharded", True
        read = {key: torch.ones_like(value) for key, value in state.items()}
        load(read, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=True)
        wrong = {key: read[key].tolist() for key in state if not torch.equal(read[key], state[key])}
        return raised, wrong


EXPECTED = {
    "floats": (False, {}),
    "a scalar": (False, {"temperature": 0.0}),
    "BatchNorm1d": (True, {}),
    "a boolean mask": (True, {}),
    "an integer count": (True, {}),
}
changed = False
for name, state in states.items():
    one, joined = attempt(state, False), attempt(state, True)
    print(f"{name:17s} (raised, other values): one file {one}, consolidated {joined}")
    changed |= one != (False, {}) or joined != EXPECTED[name]
raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/save.py"
