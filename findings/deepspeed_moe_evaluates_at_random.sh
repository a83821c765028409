#!/usr/bin/env bash
# deepspeed.moe.layer.MoE(width, expert, num_experts=8, k=...) with everything else left to its defaults.
#
# 1. In eval() the same input gives another output each time. With k=2 the second expert is drawn in evaluation as in training
#    (top2_2nd_expert_sampling; https://github.com/deepspeedai/DeepSpeed/pull/8620 is open). With k=1 it is drawn which tokens
#    leave an expert that is full (use_rts); they come out as zeros. With k=3 nothing is drawn.
# 2. All experts of a rank begin as copies of the expert that was given, so a new mixture computes what that expert computes.
# 3. used_token, which is to keep padding from the experts, is read with k=1 alone.
#
# Seen with deepspeed 0.19.8, torch 2.13.0, Python 3.11, on a CPU; capacity is eval_capacity_factor:
#   1 k=1, capacity 1: another output for 29 % of the tokens
#   1 k=1, capacity 8: another output for 0 % of the tokens
#   1 k=2, capacity 1: another output for 68 % of the tokens
#   1 k=2, capacity 8: another output for 75 % of the tokens
#   1 k=3, capacity 1: another output for 0 % of the tokens
#   1 k=3, capacity 8: another output for 0 % of the tokens
#   2 experts equal to the first: 8 of 8; the mixture is that expert to 2e-07
#   3 tokens taken by experts with half of 256 masked, k = 1, 2, 3: 128 512 768
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy setuptools wheel
install deepspeed==0.19.8
DS_ACCELERATOR=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

from deepspeed.moe.layer import MoE

TOKENS, WIDTH, EXPERTS = 256, 16, 8


def layer(k, **options):
    torch.manual_seed(0)
    return MoE(WIDTH, torch.nn.Linear(WIDTH, WIDTH), num_experts=EXPERTS, k=k, **options).eval()


def changed(a, b):
    """Percentage of tokens."""
    return round(100 * (a != b).any(dim=-1).float().mean().item())


x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
found = []
with torch.no_grad():
    for k in (1, 2, 3):
        for name, options in (("capacity 1", {}), ("capacity 8", {"eval_capacity_factor": 8.0})):
            moe = layer(k, **options)
            found.append(changed(moe(x)[0], moe(x)[0]))
            print(f"1 k={k}, {name}: another output for {found[-1]} % of the tokens")
    expert = layer(2).deepspeed_moe.experts.deepspeed_experts
    same = sum(torch.equal(e.weight, expert[0].weight) for e in expert)
    moe = layer(2, eval_capacity_factor=8.0)
    far = (moe(x)[0] - moe.deepspeed_moe.experts.deepspeed_experts[0](x)).abs().max().item()
    print(f"2 experts equal to the first: {same} of {EXPERTS}; the mixture is that expert to {far:.0e}")
    used = (torch.arange(TOKENS) < TOKENS // 2).to(torch.int64)
    taken = [int(layer(k)(x, used)[2].sum()) for k in (1, 2, 3)]
    print("3 tokens taken by experts with half of 256 masked, k = 1, 2, 3:", *taken)
drawn = [percent > 10 for percent in found]
sys.exit(not (drawn == [True, False, True, True, False, False] and same == EXPERTS and far < 1e-5 and taken == [128, 512, 768]))
PYTHON
