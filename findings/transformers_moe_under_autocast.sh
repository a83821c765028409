#!/usr/bin/env bash
# transformers 5 computes the experts of its mixtures by a grouped product, unless told otherwise, and torch's grouped product
# knows nothing of autocast: with fp32 weights under bf16 autocast, which is what "mixed precision" means to most trainers,
# the experts, most of the FLOPs, are computed in fp32, and the rest of the model in bf16. With experts_implementation="eager"
# experts are in bf16 as well. torch's FLOP counter knows nothing of it either: an MFU taken from it leaves the experts out.
#
# Seen with transformers 5.24.0, torch 2.13.0, Python 3.11, on a CPU, for the experts of a Mixtral layer:
#   default: _grouped_mm float32, output torch.float32, counted 0 % of the FLOPs
#   eager: mm bfloat16, output torch.float32, counted 100 % of the FLOPs
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 transformers==5.24.0 numpy
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralModel

D, F, E, K, T = 64, 128, 4, 2, 256
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm")


class Products(TorchDispatchMode):
    """Which products ran, and in which precision."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.seen.add(f"{name} {str(args[0].dtype).removeprefix('torch.')}")
        return func(*args, **(kwargs or {}))


def look(implementation):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=16,
    )
    if implementation:
        config._experts_implementation = implementation
    experts = MixtralModel(config).layers[0].mlp.experts
    x = torch.randn(T, D)
    chosen = torch.rand(T, E).topk(K)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        y = experts(x, chosen.indices, chosen.values)
    with FlopCounterMode(display=False) as counter:
        experts(x, chosen.indices, chosen.values)
    found = (", ".join(sorted(products.seen)), counter.get_total_flops() / (2 * T * K * 3 * D * F))
    print(f"{implementation or 'default'}: {found[0]}, output {y.dtype}, counted {100 * found[1]:.0f} % of the FLOPs")
    return found


found = [look(None), look("eager")]
sys.exit(found != [("_grouped_mm float32", 0), ("mm bfloat16", 1)])
PYTHON
