#!/usr/bin/env bash
# deepspeed.initialize with a plain AdamW, and nothing in the configuration about compiling or Muon, loads TorchInductor on
# every rank: to learn whether the optimizer is a Muon, ZeRO imports its Muon, and a decorator there calls torch.compile.
# That is some 600 modules (3,168 loaded instead of 2,579), and more time than
# importing DeepSpeed takes. Its source says that the import was moved out of `import deepspeed` because it is slow.
#
# Seen with deepspeed 0.19.8, torch 2.13.0, Python 3.11, on a CPU, ZeRO 1, one process:
#   after import deepspeed: torch._inductor.compile_fx is not loaded
#   after deepspeed.initialize: torch._inductor.compile_fx is loaded
#   with the decorator switched off: torch._inductor.compile_fx is not loaded
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy setuptools wheel
install deepspeed==0.19.8
cat >"$folder/start.py" <<'PYTHON'
import importlib
import sys

import torch

import deepspeed
from deepspeed.runtime import compiler


def say(when):
    loaded = "torch._inductor.compile_fx" in sys.modules
    print(f"{when}: torch._inductor.compile_fx is {'' if loaded else 'not '}loaded", f"({len(sys.modules)} modules)")
    return loaded


off = "off" in sys.argv
first = say("after import deepspeed")
if off:
    real, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    compiler.compile = real
model = torch.nn.Linear(4, 4)
ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=ds)
second = say("with the decorator switched off" if off else "after deepspeed.initialize")
sys.exit([first, second] != [False, not off])
PYTHON
for how in on off; do
    DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29531 \
        "$folder/venv/bin/python" "$folder/start.py" "$how" 2>/dev/null | grep compile_fx
done
