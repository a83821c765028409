#!/usr/bin/env bash
# diffusers.training_utils.EMAModel(model.parameters(), decay=0.9999, ...), as diffusers' training scripts use it.
#
# 1. The decay is not 0.9999 but (1 + step) / (10 + step) up to step 90,000. use_ema_warmup=False only chooses this warm-up
#    instead of another. At step 10,000 the average looks back about 1,000 steps. min_decay=0.9999 makes the decay constant
#    from the second step on; the first copies.
# 2. save_pretrained puts the averaged parameters into a new model. Buffers are those of a new model: running statistics, a
#    router's balancing bias. They are saved beside the parameters, and nothing tells.
# 3. The average of bf16 parameters is bf16, and stands still: what a step adds is less than half of its last bit.
#
# Seen with diffusers 0.42.1, torch 2.13.0, Python 3.11, on a CPU:
#   1 decay at steps 1, 1,001, 10,001, 90,001: 0.0 0.99109 0.9991 0.9999
#   2 bias of the model [0.1, -0.1, 0.2, -0.2], beside its average [0.0, 0.0, 0.0, 0.0]
#   3 average of a weight that went from 1 to 2, 20,000 steps later: fp32 1.865, bf16 1.0
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 diffusers==0.42.1 numpy
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
import tempfile

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import EMAModel


class Router(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 8, experts: int = 4):
        super().__init__()
        self.score = torch.nn.Linear(width, experts)
        self.register_buffer("bias", torch.zeros(experts))


weight = torch.nn.Parameter(torch.zeros(1))
ema = EMAModel([weight], decay=0.9999)
decays = [round(ema.get_decay(step), 5) for step in (1, 1_001, 10_001, 90_001)]
print("1 decay at steps 1, 1,001, 10,001, 90,001:", *decays)

model = Router()
ema = EMAModel(model.parameters(), model_cls=Router, model_config=model.config)
model.bias += torch.tensor([0.1, -0.1, 0.2, -0.2])
ema.step(model.parameters())
with tempfile.TemporaryDirectory() as folder:
    ema.save_pretrained(folder)
    saved = Router.from_pretrained(folder)
print(f"2 bias of the model {[round(b, 1) for b in model.bias.tolist()]}, beside its average {saved.bias.tolist()}")

averages = {}
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    ema = EMAModel([weight], decay=0.9999, min_decay=0.9999)
    ema.step([weight])  # the first copies, whatever the decay
    with torch.no_grad():
        weight += 1
    for _ in range(20_000):
        ema.step([weight])
    averages[dtype] = round(ema.shadow_params[0].item(), 3)
print("3 average of a weight that went from 1 to 2, 20,000 steps later: fp32 {}, bf16 {}".format(*averages.values()))
sys.exit(
    decays != [0.0, 0.99109, 0.9991, 0.9999]
    or saved.bias.abs().sum().item() != 0
    or list(averages.values()) != [1.865, 1.0]
)
PYTHON
