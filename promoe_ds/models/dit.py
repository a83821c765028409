"""One diffusion transformer for every family: Dense-DiT, ProMoE and the baselines differ by `config.moe` alone.

Legend: B images, S tokens per image, D width, C channels, H W image side, P patch side, L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.schema import Config
from promoe_ds.models.activation_checkpoint import checkpointed
from promoe_ds.models.adaln import join, leave, modulate, norm_beside, widened
from promoe_ds.models.layers import Attention, Modulation, TimestepEmbedder
from promoe_ds.moe.conditional_routing import Split, split_by_label
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.layer import LayerStats, MoELayer
from promoe_ds.moe.mlp import Linear, Mlp
from promoe_ds.moe.recompute import recomputed
from promoe_ds.moe.router import aux_losses_of


class DiTOutput(NamedTuple):
    prediction: Tensor
    """[B, C or 2C, H, W], in the order of the input"""
    aux_losses: dict[str, Tensor]
    """auxiliary losses by name, [L], one for each MoE layer, unweighted; empty outside training"""
    tokens_per_expert_LE: Tensor
    """int32 [L, E], edges of this rank per MoE layer and expert"""
    weights: list[Tensor]
    """float32 [N], gate weights of this rank's edges, by MoE layer"""


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as the matrix product it is: in fp32 no TF32 slips in."""

    def forward(self, x_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, H, W] -> tokens [B, S, D], row-major."""
        B, C, H, W = x_BCHW.shape
        P = self.kernel_size[0]
        patches = x_BCHW.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class DiTBlock(nn.Module):
    """Attention and a feed-forward part (dense MLP or MoE layer), each behind adaLN-zero."""

    def __init__(self, config: Config, is_moe: bool):
        super().__init__()
        m = config.model
        self.attn = Attention(m.width, m.heads, m.qk_norm)
        self.adaLN = Modulation(m.width, 6)
        self.mlp = MoELayer(config) if is_moe else Mlp(m.width, int(m.mlp_ratio * m.width))
        self.router_input = config.moe.router_input if config.moe else "modulated"

    def forward(self, x_BSD: Tensor, c_BD: Tensor, time_BD: Tensor, split: Split) -> tuple[Tensor, LayerStats | None]:
        """-> (x_BSD, what its MoE layer tells); c_BD is the conditioning, time_BD its part of the timestep."""
        if not isinstance(self.mlp, MoELayer):
            x_BSD, h_BSD, gate_B1D, _ = self.attend(x_BSD, c_BD)
            return leave(x_BSD, gate_B1D, *self.mlp.beside_bias(h_BSD)), None
        modulated, images = self.router_input == "modulated", self.mlp.images_seen(split)
        x_BSD, h_BSD, gate_B1D, fp32_ISD = self.attend(x_BSD, c_BD, images if modulated else 0)
        seen = fp32_ISD if modulated else self.looked_at(x_BSD, time_BD)
        out_BSD, stats = self.mlp(h_BSD, split, seen)
        return leave(x_BSD, gate_B1D, out_BSD), stats

    def looked_at(self, x_BSD: Tensor, time_BD: Tensor) -> Tensor:
        """What the router is given instead of the experts' input: [B, S, D or 2D], `moe.router_input`."""
        return recomputed(norm_beside, widened(x_BSD), *([time_BD] if self.router_input == "plain+t" else []))

    def attend(self, x_BSD: Tensor, c_BD: Tensor, seen: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Attention with its residual -> (x_BSD, input of the feed-forward part, its gate, that input of the first
        `seen` images in fp32 where it is made beside the input)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN(c_BD)
        x_BSD, h_BSD = modulate(x_BSD, shift_a, scale_a)
        out_BSD, bias_D = self.attn(h_BSD)
        x_BSD, h_BSD, fp32_ISD = join(x_BSD, gate_a, out_BSD, shift_m, scale_m, seen, bias_D)
        return x_BSD, h_BSD, gate_m, fp32_ISD


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.adaLN = Modulation(width, 2)
        self.linear = Linear(width, outputs)

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN(c_BD)
        return self.linear(modulate(x_BSD, shift, scale)[1])


class DiT(nn.Module):
    """Write nothing here that knows about ranks: `parallel.parallelize` turns this into an expert-parallel model.

    Labels are dropped by the caller (label `num_classes` is null), not in here: with labels on the host the model knows
    which images are conditional, and no layer has to ask the device.
    """

    def __init__(self, config: Config):
        super().__init__()
        m, moe_layers = config.model, set(config.moe_layers())
        self.config = config
        self.x_embedder = nn.Sequential(OrderedDict(proj=PatchProjection(m.channels, m.width, m.patch, stride=m.patch)))
        self.t_embedder = TimestepEmbedder(m.width, m.time, m.time_divisor)
        # drawn in `init_weights`; its own way to draw would load torch's compiler, a second for those who only sample
        self.y_embedder = nn.Embedding(m.num_classes + 1, m.width, _weight=torch.empty(m.num_classes + 1, m.width))
        self.pos_embed = nn.Parameter(torch.empty(1, m.tokens, m.width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config, i in moe_layers) for i in range(m.depth))
        self.final_layer = FinalLayer(m.width, m.patch**2 * m.out_channels)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, row_B: Tensor | None = None) -> DiTOutput:
        """Predict from noisy images.

        Args:
            x_BCHW: float [B, C, H, W].
            t_B: float32 [B], timestep in 0..1000 (1000 is noise).
            y_B: integers [B], labels; `num_classes` means "no class". On the host the forward never waits for the
                device; labels on the device work too, and are copied to the host once.
            row_B: int64 [B] on the host, places in the global batch, for routers whose choice depends on them in
                training (`kmeans`); 0..B-1 if not given.
        """
        split = split_by_label(y_B, self.config.model.num_classes, x_BCHW.device, row_B)
        x_BCHW, t_B = x_BCHW.index_select(0, split.order_B), t_B.index_select(0, split.order_B)
        x_BSD = self.x_embedder(x_BCHW) + self.pos_embed
        if self.config.train.residual == "bf16" and torch.is_autocast_enabled(x_BSD.device.type):
            x_BSD = x_BSD.bfloat16()
        time_BD = self.t_embedder(t_B)
        c_BD = time_BD + self.y_embedder(split.label_B)
        layers: list[LayerStats] = []
        for block in self.blocks:
            x_BSD, stats = checkpointed(block, self.config.train.activation_checkpointing, x_BSD, c_BD, time_BD, split)
            if stats is not None:
                layers.append(stats)
        out_BCHW = self.unpatchify(self.final_layer(x_BSD, c_BD)).index_select(0, split.restore_B)
        if not layers:
            return DiTOutput(out_BCHW, {}, torch.zeros(0, 0, dtype=torch.int32, device=t_B.device), [])
        tokens_per_expert_LE = tokens_per_expert(torch.stack([stats.offsets_E for stats in layers]))
        first: Any = self.blocks[self.config.moe_layers()[0]]
        aux = aux_losses_of(first.mlp.router, [stats.terms for stats in layers], tokens_per_expert_LE)
        return DiTOutput(out_BCHW, aux, tokens_per_expert_LE, [stats.weight_N for stats in layers])

    def unpatchify(self, x_BSP: Tensor) -> Tensor:
        """[B, S, P*P*C] -> [B, C, H, W]."""
        m = self.config.model
        side = m.image_size // m.patch
        x = x_BSP.view(-1, side, side, m.patch, m.patch, m.out_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, m.out_channels, m.image_size, m.image_size)
