#!/usr/bin/env bash
# torchcfm: optimal-transport flow matching (ExactOptimalTransportConditionalFlowMatcher) trains on 63 % of the images of each
# batch, some of them several times. The exact plan between equally many noises and images pairs each with one other; but pairs
# are then drawn from it with replacement, as many as the batch has, and no argument of the class changes that.
#
# 200 batches of 128 images, each an epoch. Seen with torchcfm 1.0.7, POT 0.9.7.post1, torch 2.13.0, Python 3.11:
#   the plan pairs each noise with one image:  True
#   images of a batch that are trained on:     63.4 %
#   the most frequent image, mean of batches:  4.4 times
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy scipy pot==0.9.7.post1
install --no-deps torchcfm==1.0.7
cat >"$folder/draw.py" <<'PYTHON'
import numpy as np
import torch
from torchcfm import ExactOptimalTransportConditionalFlowMatcher

BATCH, BATCHES = 128, 200
torch.manual_seed(0)
np.random.seed(0)
matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
image_ND = torch.randn(BATCH, 32)
plan_NN = matcher.ot_sampler.get_map(torch.randn(BATCH, 32), image_ND)
one_to_one = bool(((plan_NN > 1e-9).sum(0) == 1).all() and ((plan_NN > 1e-9).sum(1) == 1).all())
used, most = [], []
for _ in range(BATCHES):
    noise_ND = torch.randn(BATCH, 32)
    t_N, x_ND, velocity_ND = matcher.sample_location_and_conditional_flow(noise_ND, image_ND)
    drawn_ND = x_ND + (1 - t_N[:, None]) * velocity_ND  # the image at the end of each line
    index_N = torch.cdist(drawn_ND, image_ND).argmin(1)
    times = torch.bincount(index_N, minlength=BATCH)
    used.append((times > 0).double().mean().item())
    most.append(times.max().item())
print("the plan pairs each noise with one image: ", one_to_one)
print(f"images of a batch that are trained on:     {100 * np.mean(used):.1f} %")
print(f"the most frequent image, mean of batches:  {np.mean(most):.1f} times")
raise SystemExit(not (one_to_one and abs(np.mean(used) - 0.633) < 0.01))
PYTHON
"$folder/venv/bin/python" "$folder/draw.py" 2>/dev/null
