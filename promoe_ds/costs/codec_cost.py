"""What encoding in the step adds to it, from the codec's files; computed on `meta`, where sizes cost nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schema import Config
from promoe_ds.data.codecs import open_codec
from promoe_ds.data.coded_images import ENCODED_AT_ONCE

ALIVE = 3
"""tensors as large as the largest, at the same time: what a residual block adds to, goes into and comes out of a
convolution"""


def codec_cost(config: Config) -> dict[str, Any] | None:
    """None where the step encodes nothing; `missing`, why it is not known, where the codec cannot be opened; else

    kind; side of the pictures in pixels; params of what encodes; gflops_per_image (2 per multiply-add); bytes of
    weights (float32), and of activations, an estimate for the images that are encoded at once.
    """
    data, precision = config.data, config.data.vae_precision
    if data.name != "images" or data.vae is None:
        return None
    try:
        codec = open_codec(data.vae, option="data.vae")
    except ConfigError as error:
        return {"missing": str(error)}
    sizes = [0]
    for module in (part for whole in codec.encoding for part in whole.to("meta").modules()):
        module.register_forward_hook(lambda _, __, y: sizes.append(y.numel()))
    side = config.model.image_size * codec.factor
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        codec.encode(torch.empty(1, 3, side, side, device="meta"))
    params = sum(p.numel() for module in codec.encoding for p in module.parameters())
    return {
        "kind": codec.kind,
        "side": side,
        "params": params,
        "gflops_per_image": counter.get_total_flops() / 1e9,
        "weights": 4 * params,
        "activations": ALIVE * max(sizes) * ENCODED_AT_ONCE * (2 if precision == "bf16" else 4),
    }
