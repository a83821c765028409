#!/usr/bin/env bash
# torchdiffeq: an adaptive solver given noise in bf16 returns noise, and raises nothing, if its tolerances are finer than bf16 can
# tell. The defaults of odeint (rtol 1e-7, atol 1e-9) are, for dopri5, dopri8, bosh3 and adaptive_heun. Time is kept in float64, but
# steps reach x in its own dtype, and an error estimate made of rounding shortens them until hardly a value of x changes. Time runs
# on to the end without x. In between, at 1e-5 and 1e-6, many more evaluations give a worse answer. In float16 odeint raises
# "underflow in dt" instead. Steps of fixed length are good in both. With x in fp32 and a model in bf16 the answer is right, for 110
# instead of 44 evaluations at 1e-5, and for 15,000 by default.
#
# The exact velocity, computed in fp32, of a straight flow from noise N(0, 1) at t = 0 to data N(2, 0.5) at t = 1, for 4,096 values.
# The mean and spread that come out, and evaluations. Seen with torchdiffeq 0.2.5, torch 2.13.0, Python 3.11, on a CPU:
#   method, rtol, atol               fp32                   bf16
#   euler, 50 steps                  2.00  0.48      50     2.00  0.49      50
#   dopri5, 1e-3, 1e-6               2.00  0.51      20     1.99  0.50      62
#   dopri5, 1e-5, 1e-5               2.00  0.50      44     2.03  0.55     200
#   dopri5, 1e-6, 1e-6               2.00  0.50      44     1.99  0.59   1,460
#   dopri5, defaults                 2.00  0.50      92    -0.01  0.99 179,762
#   dopri8, 1e-5, 1e-5               2.00  0.50      54     0.45  0.83  18,332
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy scipy torchdiffeq==0.2.5
cat >"$folder/flow.py" <<'PYTHON'
import torch
from torchdiffeq import odeint

MEAN, SPREAD = 2.0, 0.5
torch.manual_seed(0)
torch.set_num_threads(1)
noise = torch.randn(4096)
evaluations = 0


def velocity(t, x):
    """d x / d t where x = (1 - t) noise + t data, given x: exact, since both are Gaussian."""
    global evaluations
    evaluations += 1
    t, at = t.float(), x.float()
    slope = (t * SPREAD**2 - (1 - t)) / ((1 - t) ** 2 + (t * SPREAD) ** 2)
    return (MEAN + slope * (at - t * MEAN)).to(x.dtype)


def solve(dtype, method, how):
    global evaluations
    evaluations = 0
    x = odeint(velocity, noise.to(dtype), torch.tensor([0.0, 1.0]), method=method, **how)[-1].float()
    return x.mean().item(), x.std().item(), evaluations


SEEN = [
    ("euler", {"options": {"step_size": 0.02}}, (2.00, 0.49, 50)),
    ("dopri5", {"rtol": 1e-3, "atol": 1e-6}, (1.99, 0.50, 62)),
    ("dopri5", {"rtol": 1e-5, "atol": 1e-5}, (2.03, 0.55, 200)),
    ("dopri5", {"rtol": 1e-6, "atol": 1e-6}, (1.99, 0.59, 1460)),
    ("dopri5", {}, (-0.01, 0.99, 179762)),
    ("dopri8", {"rtol": 1e-5, "atol": 1e-5}, (0.45, 0.83, 18332)),
]
changed = False
for method, how, seen in SEEN:
    right, found = solve(torch.float32, method, how), solve(torch.bfloat16, method, how)
    rows = ("mean {:5.2f} spread {:.2f} evaluations {:6d}".format(*row) for row in (right, found))
    print(f"{method:6s} {how or 'defaults'}: fp32", ", bf16 ".join(rows))
    changed |= abs(right[0] - MEAN) > 0.02 or abs(right[1] - SPREAD) > 0.03
    changed |= abs(found[0] - seen[0]) > 0.1 or abs(found[1] - seen[1]) > 0.1 or not 0.5 < found[2] / seen[2] < 2
try:
    solve(torch.float16, "dopri5", {})
    changed = True
except AssertionError as error:
    print("float16, defaults:", error)
raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/flow.py"
