"""Class tokens of DINOv2's ViT-L/14, the features of FD-DINOv2 (arXiv:2306.04675), as edm2 computes them.

Pictures are resized to 224 pixels (bicubic with antialiasing, not rounded) and normalised by ImageNet's mean and
deviation: NVlabs/edm2 at 4bf8162, calculate_metrics.py. The network is that of transformers, an optional extra.

Weights are trained with a table of 37 x 37 positions, and programs shrink it to 16 x 16 by different rules: edm2 takes
facebookresearch's, so it is followed here, before transformers sees the table.

Shape suffixes: N images, H W pixels, C channels, P positions, d features.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.features import Extracted, FeatureExtractor
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.network_weights import check_weights, read_weights
from promoe_ds.utils.files import file_digest

SIDE, PATCH, TRAINED_GRID = 224, 14, 37
GRID = SIDE // PATCH
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PUBLIC_FILE = "dinov2_vitl14_pretrain.pth"
"""of github.com/facebookresearch/dinov2 (1.2 GB); model.safetensors of facebook/dinov2-large holds the same weights"""
OPTION, VARIABLE = "--dinov2-weights", "DINOV2_WEIGHTS"
WAY_OUT = f"name {PUBLIC_FILE} or model.safetensors of facebook/dinov2-large: ViT-L/14 without registers"

RENAMED = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
"""names of facebookresearch's file and of transformers before version 5 -> those of the pinned transformers"""


class Size(NamedTuple):
    """Of a vision transformer."""

    width: int
    depth: int
    heads: int


VIT_L = Size(1024, 24, 16)


def shrink_positions(table_1Pd: Tensor, grid: int = GRID) -> Tensor:
    """Position table [1, 1 + g^2, d] -> [1, 1 + grid^2, d]: bicubic without antialiasing, the class position kept.

    The scale factor is (grid + 0.1) / g, not grid / g, so output i reads position (i + 0.5) g / (grid + 0.1) - 0.5:
    facebookresearch/dinov2, vision_transformer.py (interpolate_offset 0.1).
    """
    d = table_1Pd.shape[2]
    trained = int((table_1Pd.shape[1] - 1) ** 0.5)
    patches = table_1Pd[:, 1:].float().reshape(1, trained, trained, d).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, scale_factor=(grid + 0.1) / trained, mode="bicubic")
    return torch.cat([table_1Pd[:, :1].float(), patches.permute(0, 2, 3, 1).reshape(1, grid * grid, d)], 1)


def edm2_pixels(images_NHWC: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, 224, 224], resized and normalised as in edm2."""
    x_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
    x_NCHW = F.interpolate(x_NCHW, size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
    mean, deviation = (x_NCHW.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (x_NCHW - mean) / deviation


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either public file under the names of the pinned transformers; fused q, k, v are split."""
    out = {}
    for name, tensor in state.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name and len(tensor) % 3 == 0:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            out[name] = tensor
    return out


def load_dinov2(path: Path, size: Size = VIT_L) -> nn.Module:
    """transformers' network for pictures of 224 pixels, in evaluation mode, with the weights of `path`.

    Raises:
        ConfigError: transformers is absent, the file cannot be read, or it holds another network.
    """
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError:
        reject("--features", "dinov2", "transformers is not installed", "pip install 'promoe_ds[dinov2]'")
    state = renamed(read_weights(path, OPTION, WAY_OUT))
    width, depth, heads = size
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=PATCH, image_size=SIDE
    )
    with torch.device("meta"):
        net = Dinov2Model(config)
        wanted = dict(net.state_dict())
        wanted["embeddings.position_embeddings"] = torch.empty(1, 1 + TRAINED_GRID**2, width)
    check_weights(wanted, state, path, OPTION, WAY_OUT)
    state["embeddings.position_embeddings"] = shrink_positions(state["embeddings.position_embeddings"])
    net.load_state_dict(state, assign=True)
    return net.float().requires_grad_(False).eval()


def find_dinov2(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The weight file: `path`, else $DINOV2_WEIGHTS, else the public file in torch hub's folder. Nothing is fetched.

    Raises:
        ConfigError: there is none.
    """
    hub, named = Path(torch.hub.get_dir()) / "checkpoints", path or environ.get(VARIABLE)
    place = Path(named) if named else hub / PUBLIC_FILE
    if place.is_file():
        return place
    way_out = f"{WAY_OUT}, with {OPTION} or ${VARIABLE}, or put the first into {hub}; nothing is downloaded"
    fault = "the DINOv2 weights are not there" if named else f"no DINOv2 weights in {hub}"
    reject(VARIABLE if named and not path else OPTION, named or "(none)", fault, way_out)


class DINOv2(FeatureExtractor):
    """The extractor of FD-DINOv2: no checksum of the weights is published, so scores carry the file's own."""

    image_shape = (None, None, 3)
    how = {
        "resize": "224, bicubic, antialias (edm2)",
        "positions": "37 to 16, scale factor 16.1/37, bicubic, no antialias (facebookresearch)",
    }

    def __init__(self, weights: Path, device: torch.device | str = "cpu", batch: int = 64) -> None:
        """`batch` images per forward. Raises `ConfigError` as `load_dinov2` does."""
        self.weights_sha256 = file_digest(weights, state=hashlib.sha256())
        self.name = f"dinov2:{self.weights_sha256[:8]}"
        self._device, self.batch = torch.device(device), batch
        self._net = load_dinov2(weights, VIT_L).to(self._device)

    def extract(self, images_NHWC: Images) -> Extracted:
        """uint8 [N, H, W, 3] -> class tokens after the last norm, float32 [N, 1024], in full float32."""
        x_NHWC = torch.tensor(images_NHWC).to(self._device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            token_Nd = self._net(edm2_pixels(x_NHWC)).pooler_output
        return Extracted(token_Nd.cpu().numpy())
