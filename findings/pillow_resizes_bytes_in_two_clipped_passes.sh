#!/usr/bin/env bash
# Pillow and torch resize pictures by the same bicubic kernel with antialiasing, and yet up to 73 grey levels apart:
# Pillow resizes bytes in two passes, and rounds and clips to 0..255 between them. Clipping torch's result afterwards
# leaves up to 30 levels. One channel of floats (mode F) is neither rounded nor clipped: 0.01 levels from torch.
#
# So "224, bicubic, antialias" names two sets of features, for example of DINOv2: dgm-eval resizes bytes with Pillow,
# edm2 floats with torch (and calls that "almost the same"). Pictures without extremes show little of it: 1 level.
#
# torch 2.13.0, pillow 13.0.0, numpy 2.4.6, CPU. Output seen:
#   black and white noise: bytes 73.1, clipped at the end 30.0, floats 0.008; 18 % of torch's values outside 0..255
#   grey noise, 96 to 159: bytes 1.1, clipped at the end 1.0, floats 0.001; 0 % of torch's values outside 0..255
#
# Downloads torch's CUDA build from PyPI: 530 MB and its libraries, 5 GB on the disk, removed at the end. No GPU needed.
# Exits with 1 if the behaviour is another.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 pillow==13.0.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import numpy as np
import torch
from PIL import Image

SIZE = (224, 224)


def by_torch(x):
    x = torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]
    y = torch.nn.functional.interpolate(x, size=SIZE, mode="bicubic", antialias=True)
    return y[0].permute(1, 2, 0).numpy()


def by_pillow(x):
    return np.asarray(Image.fromarray(x).resize(SIZE, Image.Resampling.BICUBIC)).astype(np.float32)


def compare(name, x):
    floats = x.astype(np.float32)
    y = by_torch(x)
    ends = np.clip(y, 0, 255).round()
    planes = np.stack([by_pillow(np.ascontiguousarray(floats[..., c])) for c in range(3)], axis=-1)
    far, ended, near = (np.abs(a - b).max() for a, b in ((y, by_pillow(x)), (ends, by_pillow(x)), (y, planes)))
    outside = 100 * ((y < 0) | (y > 255)).mean()
    print(f"{name}: bytes {far:.1f}, clipped at the end {ended:.1f}, floats {near:.3f};", end=" ")
    print(f"{outside:.0f} % of torch's values outside 0..255")
    return far, ended, near


rng = np.random.default_rng(0)
far, ended, near = compare("black and white noise", (rng.integers(0, 2, (256, 256, 3)) * 255).astype(np.uint8))
assert far > 50 and ended > 20 and near < 0.05, "black and white"
far, ended, near = compare("grey noise, 96 to 159", rng.integers(96, 160, (256, 256, 3)).astype(np.uint8))
assert far < 2 and ended <= 1 and near < 0.05, "grey"
PY
"$folder/venv/bin/python" "$folder/run.py"
