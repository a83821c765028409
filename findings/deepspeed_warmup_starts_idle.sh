#!/usr/bin/env bash
# DeepSpeed: a warm-up begins with two updates at a learning rate of zero, and its default shape is logarithmic. The engine steps
# the optimizer, then the schedule, whose first two values are both that of step 0: two batches move nothing. By default the
# rate grows with the logarithm of the step: a warm-up of 1,000 steps is at two thirds of the peak after 100. WarmupCosineLR with a
# linear warm-up never reaches the peak.
#
# Warm-up of 4 steps, 10 in all, rate over the peak at each of 12 updates. Seen with deepspeed 0.19.8, torch 2.13.0, Python 3.11, on
# a CPU:
#   WarmupLR, WarmupDecayLR, log   0  0  0.5   0.79  1     1     ...
#   the same, linear               0  0  0.25  0.5   0.75  1     ...
#   WarmupCosineLR, log            0  0  0.5   0.79  1     0.93  0.75  ...
#   WarmupCosineLR, linear         0  0  0.25  0.5   0.75  0.93  0.75  ...
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy setuptools wheel
install deepspeed==0.19.8
cat >"$folder/rates.py" <<'PYTHON'
import deepspeed
import torch
from deepspeed.runtime.lr_schedules import WarmupLR

deepspeed.ops.__compatible_ops__.clear()  # compile no op of its own
STEPS, PEAK, WARMUP, TOTAL = 12, 1e-2, 4, 10


def rates(kind, **options):
    """Of each update: the rate that the optimizer has, and whether the weight moved."""
    model = torch.nn.Linear(1, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": PEAK, "torch_adam": True}},
        "scheduler": {"type": kind, "params": options},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    rate, moved = [], 0
    for _ in range(STEPS):
        before = model.weight.item()
        engine.backward(engine(torch.ones(1, 1)).sum())
        rate.append(round(engine.optimizer.param_groups[0]["lr"] / PEAK, 2))
        engine.step()
        moved += model.weight.item() != before
    return rate, moved


cases = {
    "WarmupLR": {"warmup_min_lr": 0, "warmup_max_lr": PEAK, "warmup_num_steps": WARMUP},
    "WarmupDecayLR": {"warmup_min_lr": 0, "warmup_max_lr": PEAK, "warmup_num_steps": WARMUP, "total_num_steps": TOTAL},
    "WarmupCosineLR": {"warmup_num_steps": WARMUP, "total_num_steps": TOTAL},
}
SEEN = {
    ("WarmupLR", "log"): [0, 0, 0.5, 0.79, 1, 1, 1, 1, 1, 1, 1, 1],
    ("WarmupLR", "linear"): [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1],
    ("WarmupDecayLR", "log"): [0, 0, 0.5, 0.79, 1, 1, 0.83, 0.67, 0.5, 0.33, 0.17, 0],
    ("WarmupDecayLR", "linear"): [0, 0, 0.25, 0.5, 0.75, 1, 0.83, 0.67, 0.5, 0.33, 0.17, 0],
    ("WarmupCosineLR", "log"): [0, 0, 0.5, 0.79, 1, 0.93, 0.75, 0.5, 0.25, 0.07, 0, 0],
    ("WarmupCosineLR", "linear"): [0, 0, 0.25, 0.5, 0.75, 0.93, 0.75, 0.5, 0.25, 0.07, 0, 0],
}
changed = False
for (kind, shape), seen in SEEN.items():
    rate, moved = rates(kind, **cases[kind], **({} if shape == "log" else {"warmup_type": shape}))
    print(f"{kind:15s} {shape:7s} {rate}, {moved} of {STEPS} updates move the weight", flush=True)
    changed |= rate != seen or moved != sum(value > 0 for value in seen) + (kind == "WarmupCosineLR") * 2
long = WarmupLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 0, 1.0, 1000)
long.step(100)
print(f"WarmupLR of 1,000 steps after 100: {long.get_last_lr()[0]:.3f}")
raise SystemExit(changed or round(long.get_last_lr()[0], 2) != 0.67)
PYTHON
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/ext" RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29544
"$folder/venv/bin/python" "$folder/rates.py" 2>&1 | grep -E "^Warmup|Error"
