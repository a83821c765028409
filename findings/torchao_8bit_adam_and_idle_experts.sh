#!/usr/bin/env bash
# torchao: AdamW8bit and AdamWFp8 throw weights of idle experts, and of rows of a label table, far away. Where a weight has a gradient
# in some steps alone, a small second moment is rounded to 0 (8 bits: below 1.6e-7 of the largest of 256 neighbours), and its first
# moment is kept. In a step without gradient, for an expert without tokens or a class outside of the batch, that weight moves by
# first moment / eps. Every DiT has such a table, and a layer of experts such times. Nothing warns, and a loss hardly shows it, because
# few weights are hit. AdamW4bit, which has no 0 for the second moment, and bitsandbytes' AdamW8bit are well.
#
# Longest way of one weight in one step of 100, in learning rates (Adam's own is about 1): 8 experts of 32 x 64 that have tokens in
# all steps or in half of them, and a table of 1,001 rows with labels of batches of 256. Gradients have the size 1e-3; the ways grow
# in proportion (table, 8 bits: 10 at 1e-4, 970 at 1e-2). Seen with torchao 0.18.0, bitsandbytes 0.50.2, torch 2.13.0, Python 3.11,
# on a CPU; torchao calls torch.compile, which needs a C++ compiler there:
#                          experts, all steps   experts, half   label table
#   torch AdamW                           1.1             1.1           1.3
#   bitsandbytes AdamW8bit                1.1             1.1           1.3
#   torchao AdamW8bit                     1.1            50            97
#   torchao AdamWFp8                      1.1           235           366
#   torchao AdamW4bit                     1.6             1.3           1.7
# Exits with 1 if that changes.
set -euo pipefail
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 numpy torchao==0.18.0 bitsandbytes==0.50.2
cat >"$folder/idle.py" <<'PYTHON'
import bitsandbytes
import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

RATE, STEPS, SIZE = 1e-4, 100, 1e-3


def experts(busy):
    """A layer's stacked experts, each with tokens in a share `busy` of the steps."""
    while True:
        yield SIZE * torch.randn(8, 32, 64) * (torch.rand(8, 1, 1) < busy)


def table():
    """Class embeddings: the rows of a batch's labels have gradients."""
    while True:
        yield torch.zeros(1001, 256).index_add_(0, torch.randint(1000, (256,)), SIZE * torch.randn(256, 256))


def longest(make, gradients):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros_like(next(gradients)))
    optimizer = make([parameter], lr=RATE, weight_decay=0.0)
    ways = []
    for _ in range(STEPS):
        parameter.grad, before = next(gradients), parameter.detach().clone()
        optimizer.step()
        ways.append((parameter.detach() - before).abs().max().item() / RATE)
    return max(ways)


SEEN = {
    torch.optim.AdamW: ("torch AdamW", (1.1, 1.1, 1.3)),
    bitsandbytes.optim.AdamW8bit: ("bitsandbytes AdamW8bit", (1.1, 1.1, 1.3)),
    AdamW8bit: ("torchao AdamW8bit", (1.1, 50, 97)),
    AdamWFp8: ("torchao AdamWFp8", (1.1, 235, 366)),
    AdamW4bit: ("torchao AdamW4bit", (1.6, 1.3, 1.7)),
}
changed = False
for make, (name, seen) in SEEN.items():
    found = [longest(make, gradients) for gradients in (experts(1.0), experts(0.5), table())]
    print(f"RESULT {name:23s}", *(f"{way:8.1f}" for way in found))
    changed |= any(not 0.5 * old < new < 2 * old for new, old in zip(found, seen, strict=True))
raise SystemExit(changed)
PYTHON
"$folder/venv/bin/python" "$folder/idle.py" 2>/dev/null | sed -n "s/^RESULT //p"
