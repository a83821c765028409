#!/usr/bin/env bash
# diffusers' DiTTransformer2DModel with DiT's weights is another function than DiT's code. Without any model of ours.
#
# diffusers 0.42.1, torch 2.13.0, CPU. Each claim below is checked; a change of behaviour exits non-zero.
#
# 1. Its timestep embedding has the periods 1e4^(i/127) (CombinedTimestepLabelEmbeddings, downscale_freq_shift=1); DiT's
#    (facebookresearch/DiT ed81ce2, models.py, timestep_embedding) are 1e4^(i/128). The cosine of the two embeddings falls
#    with t.
# 2. Every block holds its own timestep and label embedders, so a model trained there has as many; the final layer asks
#    those of block 0.
# 3. DiTPipeline takes row 1000 of the label table as the null label: with 10 classes it is out of range.
# 4. The norm before the MLP has eps 1e-5, the one before attention and the last 1e-6.
# Output seen:
#   1 cosine of the embeddings at t = 1, 100, 500, 999: 1.0000 0.9917 0.8157 0.4893
#   2 embedders in 3 blocks: 3
#   3 null label of 10 classes: IndexError
#   4 eps: norm1 1e-06, norm3 1e-05, norm_out 1e-06
set -eu
# shellcheck source=findings/environment.sh
. "$(dirname "$0")/environment.sh"
install torch==2.13.0 diffusers==0.42.1
cat > "$folder/run.py" <<'PY'
import math

import torch
from diffusers import DiTTransformer2DModel

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
    num_embeds_ada_norm=10,
).eval()
block = model.transformer_blocks[0]

t = torch.tensor([1.0, 100.0, 500.0, 999.0])
theirs = block.norm1.emb.time_proj(t)


def periods(divisor):
    angle = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(128) / divisor)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


assert torch.allclose(theirs, periods(127), atol=1e-3) and not torch.allclose(theirs, periods(128), atol=0.1)
near = torch.cosine_similarity(theirs, periods(128))
print("1 cosine of the embeddings at t = 1, 100, 500, 999:", *(f"{x:.4f}" for x in near.tolist()))

embedders = {id(b.norm1.emb.timestep_embedder.linear_1.weight) for b in model.transformer_blocks}
print("2 embedders in 3 blocks:", len(embedders))
assert len(embedders) == 3

try:
    model(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([1000]))
    raise SystemExit("3 it took row 1000")
except IndexError:
    print("3 null label of 10 classes: IndexError")

eps = [block.norm1.norm.eps, block.norm3.eps, model.norm_out.eps]
print("4 eps: norm1 {:g}, norm3 {:g}, norm_out {:g}".format(*eps))
assert eps == [1e-6, 1e-5, 1e-6]
PY
"$folder/venv/bin/python" "$folder/run.py"
