"""Images without a cache of latents: the training step encodes the rows it needs, on its device.

What the model sees is what shards of the same images would give: the same item, flip (before encoding) and draw of the
posterior for every row of the global batch, so x differs by the codec's rounding alone.

Shape suffixes: B images, H W pixels, M channels of moments, C of a latent, h w latent cells.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.codecs import Codec
from promoe_ds.data.dataset import Gauss, ImageDataset
from promoe_ds.data.images import DecodedImages

ENCODED_AT_ONCE = 16
"""images; at 256 pixels an autoencoder's activations take more memory than the transformer's"""


class CodedImages(ImageDataset):
    """Images whose latents are made when they are needed.

    Args:
        images: RGB, of a side that the codec's factor divides.
        encoder: the codec; `to` moves the part of it that encodes.
        bf16: encode under autocast.
    """

    unit = "cells"
    codec: dict[str, Any]

    def __init__(self, images: DecodedImages, encoder: Codec, bf16: bool = False):
        cells = images.image_size // encoder.factor
        super().__init__(images.classes, images.label_B, encoder.channels, cells, images.left_out)
        self.images, self.encoder, self.codec, self._bf16 = images, encoder, encoder.record(), bf16
        self._device = torch.device("cpu")
        side = images.image_size
        shape = f"{encoder.channels}x{cells}x{cells}"
        made = f"pictures of {side}x{side} pixels become {shape} latents in the step, by {encoder.kind}"
        self.note = f"{images.note}; {made}" if images.note else made

    @property
    def decodes(self) -> bool:
        return self.images.decodes

    def to(self, device: torch.device) -> Self:
        """Encode there from now on."""
        for module in self.encoder.encoding:
            module.to(device)
        self._device = device
        return self

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.channels, self.image_size, self.image_size

    def where(self, index: int) -> str:
        return self.images.where(index)

    def pixels(self, indices: np.ndarray, flip_B: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3], mirrored where `flip_B` (bool). Raises what `get` raises."""
        x_BHWC = self.images.pixels(indices)
        if flip_B.any():
            x_BHWC = np.where(flip_B[:, None, None, None], x_BHWC[:, :, ::-1], x_BHWC)
        return torch.from_numpy(x_BHWC)

    @torch.no_grad()
    def encode(self, pixels_BHWC: Tensor, gauss_BChw: Tensor | None) -> Tensor:
        """What the model sees, float32 [B, C, h, w] on the device of `to`.

        Args:
            pixels_BHWC: of `pixels`, on any device; a copy from pinned memory does not wait.
            gauss_BChw: draws of the posterior; None where the codec has none.
        """
        out = []
        for start in range(0, len(pixels_BHWC), ENCODED_AT_ONCE):
            part = slice(start, start + ENCODED_AT_ONCE)
            moments_BMhw = self.encoder.encode_pixels(pixels_BHWC[part].to(self._device, non_blocking=True), self._bf16)
            gauss = None if gauss_BChw is None else gauss_BChw[part].to(self._device, non_blocking=True)
            out.append(self.encoder.to_latents(moments_BMhw, gauss))
        return torch.cat(out)

    def draw(self, indices: np.ndarray, flip_B: np.ndarray, gauss: Gauss) -> tuple[Tensor, Tensor]:
        """As of latents; encodes now, and returns CPU tensors."""
        drawn = torch.from_numpy(gauss(self.latent)) if self.encoder.stochastic else None
        x_BChw = self.encode(self.pixels(indices, flip_B), drawn).cpu()
        return x_BChw, torch.from_numpy(self.label_B[indices])

    def get(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unflipped, with the mean of the posterior."""
        return self.draw(indices, np.zeros(len(indices), bool), lambda shape: np.zeros((len(indices), *shape), "f4"))
