#!/usr/bin/env bash
# DeepSpeed's checkpoint of a residual mixture (MoE(..., use_residual=True)) leaves out its dense part, the weights of `mlp`
# and `coefficient`, if "expert" is in the name that the mixture has in the model, as in `self.expert_mlp = MoE(...)`. What
# has "expert" in its whole name is kept out of the common file, and what has it in its name below the mixture is written into
# the experts' files; this has it in the first alone, and is in neither. save_checkpoint says nothing, load_checkpoint raises.
#
# Seen with deepspeed 0.19.8, torch 2.13.0, Python 3.11, on a CPU, one process; tensors:
#   moe: 0 of 11 in no file; loads
#   expert_mlp: 4 of 11 in no file: coefficient.bias, coefficient.weight, mlp.bias, mlp.weight; RuntimeError
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy setuptools wheel
install deepspeed==0.19.8
cat >"$folder/save.py" <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import torch

import deepspeed
from deepspeed.moe.layer import MoE

deepspeed.ops.__compatible_ops__.clear()  # compile no op of its own
deepspeed.init_distributed("gloo")


class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.head = torch.nn.Linear(8, 8)
        self.add_module(name, MoE(8, torch.nn.Linear(8, 8), num_experts=2, use_residual=True))


def lost(name):
    """Tensors of the model that no file of its checkpoint has, and how it loads."""
    model = Model(name)
    ds = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds)[0]
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, "last")
        written = set()
        for file in Path(folder, "last").glob("*model_states.pt"):
            state = torch.load(file, weights_only=False)  # it was written here, a line ago
            written.update(state.get("module") or state)
        missing = sorted(model.state_dict().keys() - written)
        try:
            engine.load_checkpoint(folder, "last")
            loads = "loads"
        except RuntimeError:
            loads = "RuntimeError"
    named = ": " + ", ".join(key.removeprefix(f"{name}.") for key in missing) if missing else ""
    print(f"tensors of {name}: {len(missing)} of {len(model.state_dict())} in no file{named}; {loads}")
    return len(missing), loads


sys.exit([lost("moe"), lost("expert_mlp")] != [(0, "loads"), (4, "RuntimeError")])
PYTHON
DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29549 \
    "$folder/venv/bin/python" "$folder/save.py" 2>/dev/null | grep "^tensors of" | cut -c 12-
