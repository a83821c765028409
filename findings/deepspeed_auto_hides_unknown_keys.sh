#!/usr/bin/env bash
# DeepSpeed's configuration classes refuse unknown keys ("Extra inputs are not permitted"), but not one whose value is
# "auto": it is dropped before they look, at every depth. A misspelt key of a Hugging Face style file, where most values are
# "auto", is therefore ignored without a word, and the default it was to replace stays.
#
# Seen with deepspeed 0.19.8, torch 2.13.0, pydantic 2, Python 3.11, on a CPU:
#   reduce_bucket_sizes=5000: refused
#   reduce_bucket_sizes="auto": ignored
#   offload_optimizer.pin_memry=true: refused
#   offload_optimizer.pin_memry="auto": ignored
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 setuptools wheel
install deepspeed==0.19.8
DS_ACCELERATOR=cpu "$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError


def verdict(zero):
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2, **zero}})
    except ValidationError as error:
        return "refused" if "Extra inputs are not permitted" in str(error) else str(error)
    return "ignored"


found = {}
for value in (5000, "auto"):
    found[f"reduce_bucket_sizes={json.dumps(value)}"] = verdict({"reduce_bucket_sizes": value})
for value in (True, "auto"):
    block = {"offload_optimizer": {"device": "cpu", "pin_memry": value}}
    found[f"offload_optimizer.pin_memry={json.dumps(value)}"] = verdict(block)
print(*(f"{key}: {what}" for key, what in found.items()), sep="\n")
sys.exit(list(found.values()) != ["refused", "ignored"] * 2)
PYTHON
