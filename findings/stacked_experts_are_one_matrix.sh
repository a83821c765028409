#!/usr/bin/env bash
# pytorch_optimizer: matrix optimizers take a tensor of stacked experts for one matrix. A MoE layer keeps its E experts in one
# parameter (E, in, out), as F.grouped_mm wants them. Muon and its kin flatten that to (E, in * out), the rule for
# convolutions, and orthogonalise across experts: with the same gradients and learning rate an expert moves a fifth (Muon),
# a twentieth (SPlus) or a four-hundredth (SCION) as far as it does as a matrix of its own, and in another direction.
# Shampoo and SOAP, which precondition each of the three axes, couple experts too: under Shampoo one with small gradients hardly moves.
# Nothing warns. torch.optim.Muon refuses such a parameter; AdamW treats every element alike.
#
# Eight experts of 32 x 48 whose gradients differ up to 100 times in scale, 5 steps. Length of an expert's move, stacked over
# apart (least and most of the eight), and the least cosine between the two. Seen with pytorch_optimizer 4.1.0, torch 2.13.0,
# Python 3.11, on a CPU:
#                length         cosine
#   AdamW        1.00  1.00     1.00
#   CAME         1.00  1.00     1.00
#   Muon         0.15  0.25     0.94
#   NorMuon      0.20  0.21     0.94
#   AdaMuon      1.05  1.09     0.87
#   SCION        0.002 0.003    0.93
#   SPlus        0.044 0.044    0.78
#   SOAP         1.00  1.02     0.79
#   Shampoo      0.03  0.49     0.92
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy pytorch_optimizer==4.1.0
cat >"$folder/stacked.py" <<'PYTHON'
import torch
from pytorch_optimizer import load_optimizer

torch.manual_seed(0)
EXPERTS, WIDTH, HIDDEN, STEPS = 8, 32, 48, 5
start = torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.05
scales = 0.02 * torch.logspace(-1, 1, EXPERTS)[:, None, None]
gradients = [torch.randn(EXPERTS, WIDTH, HIDDEN) * scales for _ in range(STEPS)]


def moves(name, stacked):
    """(expert, element): how far each expert went."""
    parameters = [torch.nn.Parameter(w.clone()) for w in ([start] if stacked else start)]
    group = {"params": parameters, **({"use_muon": True} if "muon" in name else {})}
    optimizer = load_optimizer(name)([group], lr=1e-3)
    for gradient in gradients:
        for parameter, g in zip(parameters, [gradient] if stacked else gradient, strict=True):
            parameter.grad = g.clone()
        optimizer.step()
    return (torch.cat([p.detach().reshape(-1, WIDTH, HIDDEN) for p in parameters]) - start).flatten(1)


SEEN = {
    "adamw": (1.0, 1.0, 1.0),
    "came": (1.0, 1.0, 1.0),
    "muon": (0.154, 0.25, 0.94),
    "normuon": (0.2, 0.206, 0.94),
    "adamuon": (1.05, 1.09, 0.87),
    "scion": (0.00196, 0.00317, 0.93),
    "splus": (0.044, 0.0445, 0.78),
    "soap": (1.0, 1.02, 0.8),
    "shampoo": (0.0274, 0.491, 0.92),
}
changed = False
for name, seen in SEEN.items():
    together, apart = moves(name, True), moves(name, False)
    ratio = together.norm(dim=1) / apart.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(together, apart, dim=1)
    found = ratio.min().item(), ratio.max().item(), cosine.min().item()
    print(f"{name:10s} length {found[0]:.4f} {found[1]:.4f}   cosine {found[2]:.2f}")
    changed |= any(abs(one - other) > 0.1 * other for one, other in zip(found, seen, strict=True))
try:
    torch.optim.Muon([torch.nn.Parameter(start.clone())])
    changed = True
except ValueError as error:
    print("torch.optim.Muon refuses:", error)
raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/stacked.py"
