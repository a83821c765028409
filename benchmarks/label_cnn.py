"""A judge for labelled images of 16 to 64 pixels: a small classifier trained on the data's own labels.

Distances between its features compare runs on the same data in the same benchmark; they are no FID.
Shape suffixes: N images, H W pixels, C channels, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promoe_ds.data import ImageDataset
from promoe_ds.evaluation.features import Features
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.metrics import label_agreement
from promoe_ds.sampling.generate import to_pixels
from promoe_ds.utils.files import atomic


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip; halves the side."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_NCHW)))))
        return F.relu(y_NCHW + self.skip(x_NCHW))


class _Net(nn.Module):
    def __init__(self, channels: int, num_classes: int, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(
            _Block(width, 2 * width), _Block(2 * width, 2 * width), _Block(2 * width, 2 * width)
        )
        self.classify = nn.Linear(2 * width, num_classes)

    def features(self, x_NCHW: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x_NCHW))).mean(dim=(2, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.classify(self.features(x_NCHW))


def judge_name(file: Path) -> str:
    """Features compare only under the same weights: `label-cnn:` and the digest of their file, "" if there is none."""
    return f"label-cnn:{hashlib.blake2b(file.read_bytes(), digest_size=4).hexdigest()}" if file.is_file() else ""


class LabelCNN:
    """Trained on `train` (seeded) unless `file` holds its weights; `accuracy` is measured on `held_out`."""

    def __init__(self, train: ImageDataset, held_out: ImageDataset, device: torch.device, steps: int, file: Path):
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._net = _Net(train.channels, train.num_classes).to(device)
        if not file.is_file():
            self._train(train, steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as temporary:
                save_file({name: t.contiguous().cpu() for name, t in self._net.state_dict().items()}, temporary)
        self._net.load_state_dict(load_file(file, device=str(device)))
        self._net.eval()
        self.name = judge_name(file)
        index = np.arange(len(held_out))
        logits = [
            self.logits(to_pixels(held_out.get(part)[0])) for part in np.array_split(index, -(-len(index) // 1000))
        ]
        self.accuracy = label_agreement(np.concatenate(logits), held_out.get(index)[1].numpy())

    def _train(self, data: ImageDataset, steps: int, batch: int = 256) -> None:
        draw = np.random.default_rng(0)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        self._net.train()
        for _ in range(steps):
            x_NCHW, label_N = data.get(draw.integers(0, len(data), batch))
            flip_N = torch.from_numpy(draw.random(batch) < 0.5)
            x_NCHW = torch.where(flip_N[:, None, None, None], x_NCHW.flip(-1), x_NCHW).to(self.device)
            loss = F.cross_entropy(self._net(x_NCHW), label_N.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _map(self, function: Callable[[Tensor], Tensor], images_NHWC: Images) -> Features:
        out = []
        with torch.inference_mode():
            for start in range(0, len(images_NHWC), 1024):
                x = torch.tensor(images_NHWC[start : start + 1024]).to(self.device).permute(0, 3, 1, 2)
                out.append(function(x.float() / 127.5 - 1.0).float().cpu())
        return torch.cat(out).numpy()

    def features(self, images_NHWC: Images) -> Features:
        """uint8 [N, H, W, C] -> float32 [N, 128], the mean over the last feature map."""
        return self._map(self._net.features, images_NHWC)

    def logits(self, images_NHWC: Images) -> Features:
        """uint8 [N, H, W, C] -> float32 [N, K]."""
        return self._map(self._net, images_NHWC)
