"""TAEF2, the tiny autoencoder of 32-channel latents: RGB to 1/8 of its side and back, 2 x 1.3 M parameters.

The layers and their names are those of the public state dicts (madebyollin/taesd, MIT), which load strictly. All
convolutions are 3x3 with padding 1 and width 64 unless they say otherwise. RGB is in [0, 1] on both sides.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTH, POOLED, LATENT = 64, 256, 32
"""channels inside, inside a middle block's 1x1 part, and of a latent"""


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """3 tanh(z / 3): keeps outliers of a generated latent within the range the decoder knows."""

    def forward(self, z: Tensor) -> Tensor:
        return (z / 3).tanh() * 3


class Block(nn.Module):
    """relu(conv-relu-conv-relu-conv(x) + x); a `middle` block adds a 1x1 part with group norm to x first."""

    def __init__(self, middle: bool = False):
        super().__init__()
        first, second, third = (_conv(WIDTH, WIDTH) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.fuse = nn.ReLU()
        self.pool = None
        if middle:
            inner, outer = nn.Conv2d(WIDTH, POOLED, 1, bias=False), nn.Conv2d(POOLED, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(inner, nn.GroupNorm(4, POOLED), nn.ReLU(), outer)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return self.fuse(self.conv(x) + x)


def _blocks(count: int, middle: bool = False) -> list[nn.Module]:
    return [Block(middle) for _ in range(count)]


def _down() -> nn.Module:
    return _conv(WIDTH, WIDTH, stride=2, bias=False)


def _up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]


def encoder() -> nn.Sequential:
    """RGB [B, 3, H, W] in [0, 1] to latents [B, 32, H/8, W/8]."""
    return nn.Sequential(
        _conv(3, WIDTH), *_blocks(1),
        _down(), *_blocks(3),
        _down(), *_blocks(3),
        _down(), *_blocks(3, middle=True),
        _conv(WIDTH, LATENT),
    )  # fmt: skip


def decoder() -> nn.Sequential:
    """Latents [B, 32, h, w] to RGB [B, 3, 8h, 8w], in [0, 1] up to overshoot."""
    return nn.Sequential(
        Clamp(), _conv(LATENT, WIDTH), nn.ReLU(), *_blocks(3, middle=True),
        *_up(), *_blocks(3),
        *_up(), *_blocks(3),
        *_up(), *_blocks(1),
        _conv(WIDTH, 3),
    )  # fmt: skip
