"""The FID variant of Inception-v3 (the TensorFlow graph of 2015-12-05) and its public weights, for ADM's protocol.

Parameter names are those of the two public conversions of that graph, so that both files load by name. What makes it
the *FID* variant, against the Inception-v3 of model zoos: 1008 logits, average pools that do not count their padding,
a max pool in the last block, and TensorFlow 1's resize, which aligns the corners of pixel (0, 0) only.

Shape suffixes: N images, H W pixels, C channels; d 2048 pool features, s 2023 spatial features, K 1008 classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from promoe_ds.config.errors import reject
from promoe_ds.evaluation.features import Extracted, FeatureExtractor
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.network_weights import check_weights, read_weights
from promoe_ds.utils.files import file_digest

SIDE = 299
SPATIAL_CHANNELS = 7
NUM_CLASSES = 1008

PUBLIC_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""the same weights: release `fid_weights` of mseitzer/pytorch-fid, release v0.2.0 of toshas/torch-fidelity (96 MB)"""
PUBLIC_SHA256 = "6726825d"
"""how the SHA-256 of either file begins; what other weights give is reported as FD[...], never as FID"""
OPTION, VARIABLE = "--inception-weights", "INCEPTION_WEIGHTS"

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel]
"""(channels, kernel)"""
Branch = tuple[str, *tuple[Layer | tuple[Layer, Layer], ...]]
"""name, then layers in sequence; a pair of layers reads the same input and is concatenated"""


def resize_tf1(x_NCHW: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's ResizeBilinear without aligned corners: float32 [N, C, H, W] -> [N, C, side, side].

    Output i reads position i * in / side: no half-pixel centres, no antialiasing, the last pixel repeated. The
    operations and their order are TensorFlow's (columns first), so that float32 results agree to the bit on a CPU.
    """
    x_NCHW = _lerp(x_NCHW, 3, side)
    return _lerp(x_NCHW, 2, side)


def _lerp(x: Tensor, dim: int, side: int) -> Tensor:
    size = x.shape[dim]
    position = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = position.long()
    fraction = (position - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
    start = x.index_select(dim, low)
    return start + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - start) * fraction


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, *, stride: int = 1, same: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_NCHW)), inplace=True)


_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving = partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """Branches and a pool, concatenated over channels. With `pooled`, the pool is followed by a 1x1 convolution.

    Without it the block halves the resolution: the pool and the last layer of each branch have stride 2, no padding.
    """

    def __init__(self, inputs: int, *branches: Branch, pool: Callable[..., Tensor] = _average, pooled: int = 0) -> None:
        super().__init__()
        self._pool, self._paths, self._projected = pool, [], pooled > 0
        for prefix, *layers in branches:
            self._paths.append(self._add(inputs, prefix, layers, halve=not pooled))
        if pooled:
            self.branch_pool = ConvBN(inputs, pooled, 1)

    def _add(self, width: int, prefix: str, layers: list[Any], halve: bool) -> list[list[str]]:
        """Register one branch; the names of its layers, level by level."""
        path = []
        for number, level in enumerate(layers, 1):
            stem = f"{prefix}_{number}" if len(layers) > 1 else prefix
            pair = isinstance(level[1], tuple) and isinstance(level[0], tuple)
            named = {stem + "a": level[0], stem + "b": level[1]} if pair else {stem: level}
            last = halve and number == len(layers)
            for name, (channels, kernel) in named.items():
                self.add_module(name, ConvBN(width, channels, kernel, stride=2 if last else 1, same=not last))
            width = sum(channels for channels, _ in named.values())
            path.append(list(named))
        return path

    def forward(self, x_NCHW: Tensor) -> Tensor:
        outputs = []
        for path in self._paths:
            y = x_NCHW
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        pooled = self._pool(x_NCHW)
        return torch.cat([*outputs, self.branch_pool(pooled) if self._projected else pooled], 1)


def _mixed_5(inputs: int, pooled: int) -> Mixed:
    five, double = ("branch5x5", (48, 1), (64, 5)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return Mixed(inputs, ("branch1x1", (64, 1)), five, double, pooled=pooled)


def _mixed_6(c: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    seven: Branch = ("branch7x7", (c, 1), (c, row), (192, column))
    double: Branch = ("branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))
    return Mixed(768, ("branch1x1", (192, 1)), seven, double, pooled=192)


def _mixed_7(inputs: int, pool: Callable[..., Tensor]) -> Mixed:
    fork: tuple[Layer, Layer] = ((384, (1, 3)), (384, (3, 1)))
    three: Branch = ("branch3x3", (384, 1), fork)
    double: Branch = ("branch3x3dbl", (448, 1), (384, 3), fork)
    return Mixed(inputs, ("branch1x1", (320, 1)), three, double, pool=pool, pooled=192)


class InceptionV3(nn.Module):
    """uint8-valued images -> pool features, spatial features and unbiased logits; 23.85 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, ("branch3x3", (384, 3)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3)), pool=_halving)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        seven: Branch = ("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
        self.Mixed_7a = Mixed(768, ("branch3x3", (192, 1), (320, 3)), seven, pool=_halving)
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, _average), _mixed_7(2048, _maximum)
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [N, 3, H, W] in 0..255, any H and W -> pool [N, 2048], spatial [N, 2023], logits [N, 1008]; float32.

        ADM's tensors: `pool_3`, `mixed_6/conv[..., :7]` (first channels of Mixed_6d, after ReLU, in NHWC order) and
        `softmax/logits/MatMul`, to which no bias is added.
        """
        x = (resize_tf1(x_NCHW.float()) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halving(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halving(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial_Ns = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool_Nd = x.mean((2, 3))
        return pool_Nd, spatial_Ns, pool_Nd @ self.fc.weight.T


def find_weights(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The weight file: `path`, else $INCEPTION_WEIGHTS, else a public file in torch hub's folder. Nothing is fetched.

    Raises:
        ConfigError: there is none; the message names the file, its public release, where to put it and its checksum.
    """
    hub, named = Path(torch.hub.get_dir()) / "checkpoints", path or environ.get(VARIABLE)
    for place in [Path(named)] if named else [hub / name for name in PUBLIC_FILES]:
        if place.is_file():
            return place
    way_out = (
        f"get {PUBLIC_FILES[0]} (release fid_weights of github.com/mseitzer/pytorch-fid) or {PUBLIC_FILES[1]} (release "
        f"v0.2.0 of github.com/toshas/torch-fidelity), whose SHA-256 begins with {PUBLIC_SHA256}, then name it with "
        f"--inception-weights or ${VARIABLE}, or put it into {hub}; nothing is downloaded by this program"
    )
    fault = "the Inception weights are not there" if named else f"no Inception weights in {hub}"
    reject(VARIABLE if named and not path else OPTION, named or "(none)", fault, way_out)


def load_inception(path: Path) -> InceptionV3:
    """The network in evaluation mode with the weights of `path`, every tensor matched by name and shape.

    Raises:
        ConfigError: the file cannot be read, or a tensor is missing, left over or of another shape.
    """
    with torch.device("meta"):
        net = InceptionV3()
    readable = f"name {PUBLIC_FILES[0]} or a .safetensors of the same tensors"
    found = read_weights(path, OPTION, readable)
    check_weights(net.state_dict(), found, path, OPTION, f"name {PUBLIC_FILES[0]}, the variant with 1008 logits")
    net.load_state_dict(found, assign=True)
    return net.float().requires_grad_(False).eval()


def fold_norms(net: nn.Module) -> nn.Module:
    """Batch norms, which are constant in evaluation, folded into the convolutions before them; in place."""
    for layer in net.modules():
        if isinstance(layer, ConvBN):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
            layer.register_module("bn", nn.Identity())
    return net


class Inception(FeatureExtractor):
    """The extractor of ADM's protocol. With the public weights, its distances are called FID and sFID.

    Other weights (another SHA-256) are named `inception:` and the first 8 digits of theirs.
    """

    image_shape = (None, None, 3)

    def __init__(self, weights: Path, device: torch.device | str = "cpu", batch: int = 64) -> None:
        """`batch` images per forward (ADM's is 64). Raises `ConfigError` as `load_inception` does."""
        self.weights_sha256 = file_digest(weights, state=hashlib.sha256())
        self.is_public = self.weights_sha256.startswith(PUBLIC_SHA256)
        self.name = "inception" if self.is_public else f"inception:{self.weights_sha256[:8]}"
        self._device, self.batch = torch.device(device), batch
        net: Any = fold_norms(load_inception(weights)).to(self._device)
        # on a CPU, convolutions are faster with channels last; elsewhere nobody has measured it
        self._net = net.to(memory_format=torch.channels_last) if self._device.type == "cpu" else net

    def extract(self, images_NHWC: Images) -> Extracted:
        """uint8 [N, H, W, 3] -> float32 pool [N, 2048], spatial [N, 2023], logits [N, 1008], in full float32."""
        x_NHWC = torch.tensor(images_NHWC).to(self._device)
        # cuDNN convolves in TF32 unless told otherwise, which moves features by 1e-3
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, spatial, logits = self._net(x_NHWC.permute(0, 3, 1, 2))
        return Extracted(*(y.cpu().numpy() for y in (pool, spatial, logits)))
