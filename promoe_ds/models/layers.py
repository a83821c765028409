"""Building blocks of the diffusion transformer (DiT, arXiv:2212.09748).

Legend: B images, S tokens per image, D width, C channels, H W image side, P patch side. Parameter names follow the
published DiT and ProMoE checkpoints where the part is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.moe import fused
from promoe_ds.moe.mlp import Linear
from promoe_ds.moe.recompute import linear


class _KeyHeld(torch.autograd.Function):
    """The bias [3D] of queries, keys and values as it is; the keys' gets no gradient."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        grad.chunk(3)[1].zero_()
        return grad


class QKV(nn.Linear):
    """Queries, keys and values in one product, x_BSD -> [B, S, 3D].

    The key bias b_k adds q.b_k to all scores of a query, which softmax ignores: its true gradient is zero, and what is
    computed is rounding noise, which Adam would turn into full-sized steps that differ between any two topologies. It
    is therefore held fixed, except under qk_norm, where it does matter.
    """

    def __init__(self, width: int, train_key_bias: bool):
        super().__init__(width, 3 * width)
        self.train_key_bias = train_key_bias

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        return linear(x_BSD, self.weight, self.bias if self.train_key_bias else _KeyHeld.apply(self.bias))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image, without mask or dropout."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = QKV(width, train_key_bias=qk_norm), Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> [B, S, D], and what `Linear.beside_bias` gives of it."""
        B, S, D = x_BSD.shape
        # Taken apart side by side, so that the gradient is put together in one pass, as the product takes it.
        q, k, v = (x.transpose(1, 2) for x in self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).unbind(2))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out_BSD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, D)
        return self.proj.beside_bias(out_BSD)


class Modulation(nn.Module):
    """adaLN: `parts` vectors of width D from the conditioning vector, zero at the start of training."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = Linear(width, parts * width)

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:
        out = self.linear(F.silu(c_BD))
        if fused.fusible(c_BD):  # the kernels' gradients of them are in fp32: cast together, not each
            out = out.float()
        return out[:, None].chunk(self.parts, dim=-1)


class TimestepEmbedder(nn.Module):
    """Timestep (float, 0..1000) -> sinusoids (cosines first, periods to 1e4) -> two-layer SiLU MLP.

    Args:
        width: D.
        time: what the sinusoids are of: "t", "sigma" = t / 1000, or "1-sigma".
        divisor: of the exponent of their periods.
    """

    FREQUENCIES = 256

    def __init__(self, width: int, time: str = "t", divisor: int = FREQUENCIES // 2):
        super().__init__()
        self.time, self.divisor = time, divisor
        self.mlp = nn.Sequential(Linear(self.FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        weight = self.mlp[0].weight
        assert isinstance(weight, Tensor)
        if self.time != "t":
            t_B = t_B / 1000 if self.time == "sigma" else 1 - t_B / 1000
        return self.mlp(sinusoids(t_B, self.FREQUENCIES, self.divisor).to(weight.dtype))


def sinusoids(t_B: Tensor, dim: int, divisor: int, max_period: float = 1e4) -> Tensor:
    """[B] -> float32 [B, dim]: cos and sin of t / max_period^(i / divisor), i below dim/2.

    DiT's code divides by dim/2, diffusers' port of it by dim/2 - 1 (`CombinedTimestepLabelEmbeddings`, 0.42.1).
    """
    exponent = -math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t_B.device) / divisor
    angle = t_B.float()[:, None] * torch.exp(exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_sinusoids(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position table, float32 [1, side*side, D]; row-major tokens, column position first."""
    omega = 1 / 1e4 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for position in (column, row):
        angle = position.reshape(-1, 1).double() * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()[None]
