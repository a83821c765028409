#!/usr/bin/env bash
# FLOP counters: grouped_mm counts as nothing. Seven of seven report 1.5 to 2 % of the work of a MoE layer whose experts are one
# tensor, multiplied by torch.nn.functional.grouped_mm, as torchtitan, transformers and others have them now. Nothing warns, and
# an MFU from such a count is too low by as much. Experts written in other ways are counted or not: each counter draws its line
# elsewhere, at modules, at functions or at operators. Attention on a CPU is counted by DeepSpeed alone.
#
# One layer, 256 tokens, 8 experts (64 to 128 to 64), 2 per token: the count as a share of 2 FLOPs per multiply-add of experts and
# gate. Attention is F.scaled_dot_product_attention alone. Counters of multiply-adds are doubled. Seen with torch 2.13.0,
# deepspeed 0.19.8, fvcore 0.1.5, thop 0.1.1, torchinfo 1.8.0, calflops 0.3.2, ptflops 0.7.5, Python 3.11, on a CPU:
#                     torch  fvcore  thop  torchinfo  deepspeed  calflops  ptflops  ptflops (aten)
#   nn.Linear          1.00    1.00  1.00       1.00       1.00      1.00     1.01            1.00
#   F.linear           1.00    1.00  0.02       0.02       1.00      1.00     0.02            1.00
#   rows @ weight      1.00    1.00  0.02       0.02       1.00      0.02     0.02            1.00
#   F.grouped_mm       0.02    0.02  0.02       0.02       0.02      0.02     0.02            0.02
#   attention          0.00    0.00  0.00       0.00       1.00      0.00     0.00            0.00
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy deepspeed==0.19.8 fvcore==0.1.5.post20221221 thop==0.1.1.post2209072238 torchinfo==1.8.0 \
    calflops==0.3.2 transformers==5.24.0 ptflops==0.7.5
cat >"$folder/count.py" <<'PYTHON'
import contextlib
import io
import warnings

import torch
import torch.nn.functional as F
from calflops import calculate_flops
from deepspeed.profiling.flops_profiler import FlopsProfiler
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary

TOKENS, WIDTH, HIDDEN, EXPERTS, PER_TOKEN = 256, 64, 128, 8, 2
warnings.filterwarnings("ignore")


class Experts(nn.Module):
    """Tokens go to their two best experts; `rows`, sorted by expert, of which expert e has counts[e], are its input."""

    EXACT = 2 * TOKENS * (PER_TOKEN * 2 * WIDTH * HIDDEN + WIDTH * EXPERTS)

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.02)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.02)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(PER_TOKEN, -1)
        expert, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=EXPERTS)
        y = self.experts(x[order // PER_TOKEN], counts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // PER_TOKEN, y)

    def experts(self, rows, counts):
        return torch.cat([self.expert(e, part) for e, part in enumerate(rows.split(counts.tolist()))])


class Linears(Experts):
    def __init__(self):
        super().__init__()
        del self.up, self.down
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(EXPERTS))

    def expert(self, e, rows):
        return self.down[e](F.gelu(self.up[e](rows)))


class Functions(Experts):
    def expert(self, e, rows):
        return F.linear(F.gelu(F.linear(rows, self.up[e].T)), self.down[e].T)


class Products(Experts):
    def expert(self, e, rows):
        return F.gelu(rows @ self.up[e]) @ self.down[e]


class Grouped(Experts):
    def experts(self, rows, counts):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(F.gelu(F.grouped_mm(rows, self.up, offs=offsets)), self.down, offs=offsets)


class Attention(nn.Module):
    EXACT = 2 * 2 * TOKENS * TOKENS * WIDTH

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        heads = (x * self.scale).reshape(1, TOKENS, 4, WIDTH // 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


def by_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def by_deepspeed(model, x):
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(x)
    count = profiler.get_total_flops()
    profiler.end_profile()
    return count


def by_ptflops(backend):
    def count(model, x):
        quiet = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
        macs, _ = get_model_complexity_info(model, (WIDTH,), input_constructor=lambda _: {"x": x}, backend=backend, **quiet)
        return 2 * (macs or 0)

    return count


counters = {
    "torch": by_torch,
    "fvcore": lambda model, x: 2 * FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total(),
    "thop": lambda model, x: 2 * profile(model, inputs=(x,), verbose=False)[0],
    "torchinfo": lambda model, x: 2 * summary(model, input_data=x, verbose=0).total_mult_adds,
    "deepspeed": by_deepspeed,
    "calflops": lambda model, x: calculate_flops(model, args=[x], print_results=False, output_as_string=False)[0],
    "ptflops": by_ptflops("pytorch"),
    "ptflops (aten)": by_ptflops("aten"),
}
print(f"{'':12s}" + "".join(f"{name:>16s}" for name in counters))
table = {}
for kind in (Linears, Functions, Products, Grouped, Attention):
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH)
    row = []
    for count in counters.values():
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            row.append(round(count(kind().eval(), x) / kind.EXACT, 2))
    table[kind.__name__] = row
    print(f"{kind.__name__:12s}" + "".join(f"{value:16.2f}" for value in row), flush=True)

SEEN = {
    "Linears": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.0],
    "Functions": [1.0, 1.0, 0.02, 0.02, 1.0, 1.0, 0.02, 1.0],
    "Products": [1.0, 1.0, 0.02, 0.02, 1.0, 0.02, 0.02, 1.0],
    "Grouped": [0.02] * 8,
    "Attention": [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
}
raise SystemExit(any(abs(one - other) > 0.015 for kind in SEEN for one, other in zip(table[kind], SEEN[kind], strict=True)))
PYTHON
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder" "$folder/venv/bin/python" "$folder/count.py" 2>&1 | grep -v -i -E "warn|^\["
