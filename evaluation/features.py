"""Feature extractors: uint8 images -> float32 vectors whose Gaussian statistics are compared.

`extractors.py` builds them by name.
Shape suffixes: N images, H W pixels, C channels, d features, s spatial features, K classes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.evaluation.digits import Digits, digits_split, noise_images
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.metrics import label_agreement

Features = npt.NDArray[np.float32]


class Extracted(NamedTuple):
    """What one pass over images gives; float32."""

    features_Nd: Features
    spatial_Ns: Features | None = None
    logits_NK: Features | None = None


class FeatureExtractor(ABC):
    """Turns images into features, and where it can into spatial features and logits, in one pass."""

    name: str
    batch: int
    """most images that `extract` is given at once"""
    image_shape: tuple[int | None, int | None, int | None] = (None, None, None)
    """(H, W, C) it accepts; None for any"""
    is_public = False
    """True only for the public Inception weights: distances on other features are called `FD[name]`, never FID"""
    weights_sha256: str | None = None
    how: Mapping[str, str] = {}
    """what else decides the features, for the record of a score"""
    num_classes: int | None = None
    """of a classifier: its logits are of the classes that the images are labelled with"""
    accuracy: float | None = None
    """of a classifier: share of held-out real images that it gets right, in [0, 1]"""

    @abstractmethod
    def extract(self, images_NHWC: Images) -> Extracted:
        """uint8 [1 <= N <= batch, H, W, C] -> `Extracted`."""

    def wants(self, shape: tuple[int, ...]) -> str | None:
        """None if it takes images of this shape (H, W, C); else the shape it takes, such as [any, any, 3]."""
        if all(side in (None, size) for side, size in zip(self.image_shape, shape, strict=True)):
            return None
        return f"[{', '.join(str(side or 'any') for side in self.image_shape)}]"

    def try_out(self, shape: tuple[int, int, int]) -> None:
        """Extract from one image of noise of this shape (H, W, C), before hours are spent on drawing others.

        Raises `ConfigError` if a network of the user's makes no features of it.
        """
        self.extract(noise_images(1, shape, 0))


class DigitsNet(nn.Module):
    """Three 3x3 convolutions and two linear layers on [N, 1, 8, 8] in [-1, 1]; 45 k parameters.

    The features are the penultimate layer before its GELU: after it, a net this small leaves many of the 64
    nearly constant on digits, and a distance cannot see what is constant.
    """

    def __init__(self, width: int = 32, feature_dim: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.embed = nn.Linear(2 * width * 2 * 2, feature_dim)
        self.classify = nn.Linear(feature_dim, 10)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """Penultimate layer before its activation, [N, 64]."""
        x_NCHW = F.gelu(self.conv1(x_NCHW))
        x_NCHW = F.max_pool2d(F.gelu(self.conv2(x_NCHW)), 2)
        x_NCHW = F.max_pool2d(F.gelu(self.conv3(x_NCHW)), 2)
        return self.embed(x_NCHW.flatten(1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits, [N, 10]."""
        return self.classify(F.gelu(self.features(x_NCHW)))


class DigitsCNN(FeatureExtractor):
    """`digits-cnn`: a small classifier trained on real digits, once per process (about 1.5 s on one CPU thread).

    The same weights on every run of a machine: own generator, one thread, the fixed split of `digits_split`.
    """

    name = "digits-cnn"
    batch = 1024
    image_shape = (8, 8, 1)
    num_classes = 10

    def __init__(self, *, epochs: int = 10, seed: int = 0) -> None:
        self._net, held_out = _trained(epochs, seed), digits_split()[1]
        self.accuracy = label_agreement(self.logits(held_out.images_NHWC), held_out.labels_N)

    def extract(self, images_NHWC: Images) -> Extracted:
        """uint8 [N, 8, 8, 1] -> features [N, 64] and logits [N, 10]."""
        return Extracted(self.features(images_NHWC), None, self.logits(images_NHWC))

    def features(self, images_NHWC: Images) -> Features:
        """uint8 [N, 8, 8, 1] -> float32 [N, 64], the penultimate layer before its activation."""
        return _in_batches(self._net.features, images_NHWC)

    def logits(self, images_NHWC: Images) -> Features:
        """uint8 [N, 8, 8, 1] -> float32 [N, 10]."""
        return _in_batches(self._net, images_NHWC)


def _net_input(images_NHWC: Images) -> Tensor:
    return torch.tensor(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _in_batches(function: Callable[[Tensor], Tensor], images_NHWC: Images, size: int = 1024) -> Features:
    with torch.inference_mode():
        chunks = [function(_net_input(images_NHWC[i : i + size])) for i in range(0, len(images_NHWC), size)]
    return torch.cat(chunks).numpy()


@functools.cache
def _trained(epochs: int, seed: int) -> DigitsNet:
    """The network of these numbers; nobody writes to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # float sums depend on how many threads share them; scores must not
    try:
        return _train(digits_split()[0], epochs=epochs, generator=torch.Generator().manual_seed(seed))
    finally:
        torch.set_num_threads(threads)


def _train(data: Digits, *, epochs: int, generator: torch.Generator, batch_size: int = 64) -> DigitsNet:
    """AdamW with a cosine-annealed rate on the cross-entropy; float32 on the CPU.

    Starts from Kaiming-uniform weights and zero biases.
    """
    x_NCHW, labels_N = _net_input(data.images_NHWC), torch.tensor(data.labels_N)
    with torch.device("meta"):  # elsewhere the layers' constructors would draw from the global RNG
        net = DigitsNet()
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data), generator=generator).split(batch_size):
            loss = F.cross_entropy(net(x_NCHW[batch]), labels_N[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()
