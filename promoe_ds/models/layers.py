"""Building blocks of the diffusion transformer (DiT, arXiv:2212.09748).

Legend: B images, S tokens per image, D width, C channels, H W image side, P patch side. Parameter names follow the
published DiT and ProMoE checkpoints where the part is the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.moe import fused
from promoe_ds.moe.recompute import linear


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
        bias = self.bias
        if not self.train_key_bias:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, k.detach(), v])
        return linear(x_BSD, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image, without mask or dropout."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = QKV(width, train_key_bias=qk_norm), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        # Taken apart side by side, so that the gradient is put together in one pass, as the product takes it.
        q, k, v = (x.transpose(1, 2) for x in self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).unbind(2))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, D))


class Modulation(nn.Module):
    """adaLN: `parts` vectors of width D from the conditioning vector, zero at the start of training."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c_BD))[:, None].chunk(self.parts, dim=-1)


def norm(x_BSD: Tensor) -> Tensor:
    """In front of every part of a block, without affine parameters of its own."""
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=1e-6)


def adaln(
    x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, dtype: torch.dtype = torch.float32, narrow: bool = False
) -> Tensor:
    """The norm and its modulation; on CUDA in `dtype`, that of the product that takes it (`product_dtype`).

    A `narrow` stream (`train.residual=bf16`) is normalised in fp32.
    """
    if fused.fusible(x_BSD):
        return fused.residual_adaln(x_BSD, None, None, shift_B1D, scale_B1D, dtype)[1]
    return norm(x_BSD.float() if narrow else x_BSD) * (1 + scale_B1D) + shift_B1D


def norm_beside(x_BSD: Tensor, narrow: bool, *time_BD: Tensor) -> Tensor:
    """The norm, and beside it the timestep's part of the conditioning if it is given: [B, S, D or 2D]."""
    out_BSD = norm(x_BSD.float() if narrow else x_BSD)
    return torch.cat([out_BSD, *(t_BD[:, None].expand_as(out_BSD).to(out_BSD.dtype) for t_BD in time_BD)], dim=-1)


def residual_adaln(
    x_BSD: Tensor, gate_B1D: Tensor | None, out_BSD: Tensor | None, shift_B1D: Tensor, scale_B1D: Tensor,
    dtype: torch.dtype = torch.float32, narrow: bool = False, both: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A part's output joins the residual stream -> (the stream, its `adaln` for the next part).

    On CUDA the latter is in `dtype`, and with `both` it is returned a second time, in fp32. The first part of a block
    has no output before it; on CUDA the stream passes through all the same, so that gradients are added in one pass.
    """
    if fused.fusible(x_BSD):
        results = fused.residual_adaln(x_BSD, gate_B1D, out_BSD, shift_B1D, scale_B1D, dtype, both)
        return results if both else results[:2]
    if gate_B1D is not None and out_BSD is not None:
        x_BSD = x_BSD + gate_B1D * out_BSD
    return x_BSD, adaln(x_BSD, shift_B1D, scale_B1D, narrow=narrow)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer takes x: autocast's if it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def is_narrow(x_BSD: Tensor) -> bool:
    """Whether the stream is in half precision under autocast, `train.residual`: norms are then computed in fp32."""
    return x_BSD.dtype == torch.bfloat16 and torch.is_autocast_enabled(x_BSD.device.type)


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
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

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
