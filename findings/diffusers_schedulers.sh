#!/usr/bin/env bash
# What schedulers of diffusers do when they are exchanged by from_config, without any model of ours.
#
# diffusers 0.42.1, torch 2.13.0, numpy 2.x, CPU. Each claim below is checked; a change of behaviour exits non-zero.
# A point of data z is the ruler: its right prediction is known at each time, and x then holds noise of a known size.
#
# 1. from_config keeps only values that were passed: Heun's betas come out as its own 0.00085..0.012 from a
#    DDPMScheduler() in memory (whose betas are 0.0001..0.02), and as 0.0001..0.02 from the same one saved and loaded.
# 2. DDIMScheduler steps from t to t - 1000//n, whatever comes next on its own list. "linspace", 5 steps: the last call
#    tells t=0 while x holds 20 times that noise; 600 steps: 7 times; "trailing", 5 steps: 1.00 times.
# 3. DEISMultistepScheduler with use_flow_sigmas never takes the step to 0: noise of 0.22 is left after 5 steps, of 0.06
#    after 20. DPMSolverMultistepScheduler, with the same sigmas, leaves 0.00.
# 4. DPMSolverMultistepInverseScheduler with use_flow_sigmas is no inverse: it goes from noise to data (1.0 to 0.0).
# 5. UniPC, DPM-Solver and DEIS list flow times as integers (of 1000): at 600 steps, the lowest level 0.00267 is listed as 2.
# Output seen:
#   1 heun from memory: beta 0.00085 .. 0.01200; from disk: 0.00010 .. 0.02000
#   2 ddim noise at worst, as told = 1: linspace 5 20.1, linspace 600 7.4, trailing 5 1.0
#   3 left after 5 and 20 steps: deis 0.224 0.056, dpm-solver 0.000 0.000
#   4 inverse: first level 0.9990, last 0.0050 after 200 steps
#   5 unipc lists 2 for level 0.00267
set -eu
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 diffusers==0.42.1
cat > "$folder/run.py" <<'PY'
import tempfile

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

Z = 0.5
E = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
E = E / E.square().mean().sqrt()


def size(x):
    return float(x.square().mean().sqrt())


memory = HeunDiscreteScheduler.from_config(DDPMScheduler().config)
with tempfile.TemporaryDirectory() as folder:
    DDPMScheduler().save_pretrained(folder)
    disk = HeunDiscreteScheduler.from_config(DDPMScheduler.from_pretrained(folder).config)
ends = [float(s.betas[i]) for s in (memory, disk) for i in (0, -1)]
print("1 heun from memory: beta {:.5f} .. {:.5f}; from disk: {:.5f} .. {:.5f}".format(*ends))
assert torch.allclose(torch.tensor(ends), torch.tensor([0.00085, 0.012, 0.0001, 0.02]))


def ddim(spacing, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, worst = E, 0.0
    for t in scheduler.timesteps:
        bar = scheduler.alphas_cumprod[t]
        noise = (x - bar.sqrt() * Z) / (1 - bar).sqrt()
        worst = max(worst, size(noise))
        x = scheduler.step(noise, t, x).prev_sample
    return worst


worst = [ddim("linspace", 5), ddim("linspace", 600), ddim("trailing", 5)]
print("2 ddim noise at worst, as told = 1: linspace 5 {:.1f}, linspace 600 {:.1f}, trailing 5 {:.1f}".format(*worst))
assert worst[0] > 15 and worst[1] > 5 and worst[2] < 1.05


def flow(kind, steps):
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    x = E
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        noise = (x - (1 - sigma) * Z) / sigma
        x = scheduler.step(noise - Z, t, x).prev_sample
    return size(x - Z), scheduler


left = [flow(kind, n)[0] for kind in (DEISMultistepScheduler, DPMSolverMultistepScheduler) for n in (5, 20)]
print("3 left after 5 and 20 steps: deis {:.3f} {:.3f}, dpm-solver {:.3f} {:.3f}".format(*left))
assert left[0] > 0.15 and left[1] > 0.04 and max(left[2:]) < 0.001

rest, inverse = flow(DPMSolverMultistepInverseScheduler, 200)
first, last = float(inverse.sigmas[0]), float(inverse.sigmas[-1])
print(f"4 inverse: first level {first:.4f}, last {last:.4f} after 200 steps")
assert first > 0.99 and last < 0.01 and rest < 0.02

_, unipc = flow(UniPCMultistepScheduler, 600)
level, listed = float(unipc.sigmas[-2]), int(unipc.timesteps[-1])
print(f"5 unipc lists {listed} for level {level:.5f}")
assert abs(listed / 1000 - level) > 0.0005
PY
"$folder/venv/bin/python" "$folder/run.py"
