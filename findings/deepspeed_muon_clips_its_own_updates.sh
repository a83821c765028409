#!/usr/bin/env bash
# DeepSpeed's Muon at ZeRO 1 and 2 is clipped after gradients have been made orthogonal matrices, and clipping is on unless
# "gradient_clipping": 0 is written (the default is 1.0). Orthogonal matrices have a norm of their own, up to the root of the
# sum of their ranks, whatever the gradients. Each update is divided by it, so the learning rate falls as the model grows,
# and get_global_grad_norm() tells that norm. At ZeRO 0 it is the gradients that are clipped, which Muon does not feel.
# (https://github.com/deepspeedai/DeepSpeed/issues/8439)
#
# Seen with deepspeed 0.19.8, torch 2.13.0, Python 3.11, on a CPU, one process, 16 square matrices, the first step:
#   ZeRO 1, width 16, loss x 1, default: norm told 7.19, change over lr 1
#   ZeRO 1, width 256, loss x 1, default: norm told 16, change over lr 1
#   ZeRO 1, width 16, loss x 1, no clipping: norm told 7.19, change over lr 7.19
#   ZeRO 1, width 256, loss x 1, no clipping: norm told 16, change over lr 16
#   ZeRO 1, width 256, loss x 1000, default: norm told 21, change over lr 1
#   ZeRO 2, width 256, loss x 1, default: norm told 16, change over lr 1
#   ZeRO 0, width 256, loss x 1, default: norm told none, change over lr 16
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy setuptools wheel
install deepspeed==0.19.8
cat >"$folder/step.py" <<'PYTHON'
import sys

import torch

import deepspeed

LR = 0.02
deepspeed.ops.__compatible_ops__.clear()  # compile no op of its own


def step(stage, width, scale=1.0, **clipping):
    """Of the first step of 16 matrices: the norm that DeepSpeed tells, and that of the change of weights over lr."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(16)))
    before = [p.detach().clone() for p in model.parameters()]
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Muon", "params": {"lr": LR, "momentum": 0.95}},
        **clipping,
    }
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds)[0]
    engine.backward(scale * engine(torch.randn(32, width)).square().mean())
    engine.step()
    change = torch.stack([(p.detach() - q).norm() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    norm = engine.get_global_grad_norm()
    how = "no clipping" if clipping else "default"
    told = "none" if norm is None else f"{float(norm):.3g}"
    print(f"ZeRO {stage}, width {width}, loss x {scale:g}, {how}: norm told {told}, change over lr {float(change) / LR:.3g}")
    return float(change) / LR


off = {"gradient_clipping": 0}
small, large = [step(1, width) for width in (16, 256)]
free_small, free_large = [step(1, width, **off) for width in (16, 256)]
strong = step(1, 256, scale=1e3)
two, zero = step(2, 256), step(0, 256)
ones = all(0.9 < change < 1.1 for change in (small, large, strong, two))
sys.exit(not (ones and free_large > 2 * free_small > 10 and zero > 0.9 * free_large))
PYTHON
DS_ACCELERATOR=cpu TORCH_COMPILE_DISABLE=1 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29543 \
    "$folder/venv/bin/python" "$folder/step.py" 2>/dev/null | grep "norm told"
