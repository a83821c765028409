#!/usr/bin/env bash
# ema-pytorch: an EMA follows its weights 10 or 100 times more slowly than its decay or sigma_rel says, unless update_every=1.
# EMA is updated every 10 steps and PostHocEMA every 100 by default, but each update applies the decay of one step. So
# sigma_rel=0.05, which asks for an average whose weights spread over a twentieth of the training (arXiv:2312.02696), gives
# most weight to the beginning; models that PostHocEMA synthesizes afterwards inherit it.
#
# The weight of a model is set to step / 10,000 at each of 10,000 steps, so that an average says from when its weights are:
# 0 is the first step, 1 the last. Seen with ema-pytorch 0.8.3, torch 2.13.0, Python 3.11, on a CPU:
#                                            asked for  update_every=1     10    100
#   PostHocEMA, sigma_rel 0.05                   0.947           0.947  0.642  0.151
#   PostHocEMA, sigma_rel 0.28                   0.539           0.539  0.105  0.012
#   synthesized from both, sigma_rel 0.15        0.820           0.820  0.242  0.041
#   EMA, beta 0.99 without warm-up               0.990           0.990  0.900  0.366
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy ema-pytorch==0.8.3
cat >"$folder/age.py" <<'PYTHON'
import tempfile
from pathlib import Path

import torch
from ema_pytorch import EMA, PostHocEMA

STEPS = 10_000
columns = {}
for every in (1, 10, 100):
    model = torch.nn.Linear(1, 1, bias=False)
    with tempfile.TemporaryDirectory() as folder:
        saved = {"checkpoint_every_num_steps": 1000, "checkpoint_folder": folder, "checkpoint_dtype": torch.float32}
        karras = PostHocEMA(model, sigma_rels=(0.05, 0.28), update_every=every, **saved)
        plain = EMA(model, beta=0.99, min_value=0.99, update_after_step=0, update_every=every)
        for step in range(1, STEPS + 1):
            model.weight.data.fill_(step / STEPS)
            karras.update()
            plain.update()
        late = karras.synthesize_ema_model(sigma_rel=0.15)
    averages = [*karras.ema_models, late, plain]
    columns[every] = [round(average.ema_model.weight.item(), 3) for average in averages]
    print(f"update_every={every}: {columns[every]}")


def asked(sigma_rel):
    """Mean of t^gamma on [0, 1], whose standard deviation is sigma_rel: equation 127 of the paper, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        gamma = (low + high) / 2
        wide = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) > sigma_rel
        low, high = (gamma, high) if wide else (low, gamma)
    return round((gamma + 1) / (gamma + 2), 3)


print("asked for:", [asked(0.05), asked(0.28), asked(0.15), 1 - 0.01])
seen = {1: [0.947, 0.539, 0.82, 0.99], 10: [0.642, 0.105, 0.242, 0.9], 100: [0.151, 0.012, 0.041, 0.366]}
pairs = [pair for every in seen for pair in zip(columns[every], seen[every], strict=True)]
raise SystemExit(any(abs(one - other) > 0.002 for one, other in pairs))
PYTHON
"$folder/venv/bin/python" "$folder/age.py"
