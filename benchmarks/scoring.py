"""Scores of a trained run on small real data: EMA loss, FD, an Inception-like score, label agreement.

The judge is a small classifier trained on the data's own labels. Distances between its features compare runs on the
same data in the same benchmark; they are no FID.
Shape suffixes: N images, B images of a batch, H W pixels, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from promoe_ds.analysis.collect import Plan, observe
from promoe_ds.analysis.measures import chance_entropy, explained_entropy
from promoe_ds.checkpoint.load_weights import load_ema
from promoe_ds.config.schema import Config, DataConfig
from promoe_ds.data import ImageDataset
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.evaluation.features import DigitsCNN, Features
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics, inception_score, label_agreement
from promoe_ds.models.dit import DiT
from promoe_ds.moe.observe import max_over_mean
from promoe_ds.sampling.generate import (
    SamplingOptions,
    class_labels,
    draw_batches,
    image_noise,
    pixel_batches,
    to_pixels,
)
from promoe_ds.utils.files import atomic

SCORE_SEED = 1234
"""of the noise and the timesteps that every row is scored with"""
OBSERVED = 1000
"""images on which the choices of experts are counted"""


class LabelCNN:
    """Seven 3x3 convolutions for images of 16 to 64 pixels, with a fixed seed.

    Args:
        train, held_out: what it learns from, and what `accuracy` is of.
        steps: of its training.
        file: where its weights are kept once it is trained, so that all runs have the same judge.
    """

    name = "label-cnn"

    def __init__(self, train: ImageDataset, held_out: ImageDataset, steps: int, file: Path):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            width = train.channels
            for next_width, stride in zip([64, *[128] * 6], [1, 2, 1, 2, 1, 2, 1], strict=True):
                conv = nn.Conv2d(width, next_width, 3, stride=stride, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(next_width), nn.ReLU()]
                width = next_width
            classify = nn.Linear(width, train.num_classes)
            self._net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classify).to(self.device)
        if file.exists():
            self._net.load_state_dict(load_file(file))
        else:
            self._train(train, steps)
            with atomic(file) as temporary:
                save_file(self._net.state_dict(), temporary)
        self._net.eval()
        x_NCHW, label_N = held_out.get(np.arange(len(held_out)))
        self.accuracy = label_agreement(self.logits(to_pixels(x_NCHW)), label_N.numpy())

    def _train(self, data: ImageDataset, steps: int, batch: int = 256) -> None:
        draw = np.random.default_rng(0)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            x_NCHW, label_N = data.get(draw.integers(0, len(data), batch))
            flip_N = torch.from_numpy(draw.random(batch) < 0.5)
            x_NCHW = torch.where(flip_N[:, None, None, None], x_NCHW.flip(-1), x_NCHW).to(self.device)
            loss = F.cross_entropy(self._net(x_NCHW), label_N.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def features(self, images_NHWC: Images) -> Features:
        """uint8 [N, H, W, C] -> float32 [N, 128], the mean over the last feature map."""
        out = []
        for part_NHWC in np.split(images_NHWC, range(1024, len(images_NHWC), 1024)):
            x_NCHW = torch.tensor(part_NHWC).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            out.append(self._net[:-1](x_NCHW).cpu())
        return torch.cat(out).numpy()

    @torch.inference_mode()
    def logits(self, images_NHWC: Images) -> Features:
        """uint8 [N, H, W, C] -> float32 [N, K]."""
        return self._net[-1](torch.tensor(self.features(images_NHWC)).to(self.device)).cpu().numpy()


Judge = DigitsCNN | LabelCNN


class Standard:
    """What all runs of a data set are scored by: the judge, and real images as it sees them.

    Args:
        data: images of the reference of FD, and of the EMA loss: all of them, or 10,000.
        where: the same images, to observe the experts on.
    """

    def __init__(self, judge: Judge, data: ImageDataset, where: DataConfig):
        self.judge, self.data, self.where = judge, data, where
        self.real = min(10_000, len(data))
        x_NCHW, _ = data.get(np.arange(self.real) * len(data) // self.real)
        self.reference = gaussian_statistics(judge.features(to_pixels(x_NCHW)))


@torch.no_grad()
def ema_loss(model: DiT, config: Config, data: ImageDataset, num: int, batch: int, device: torch.device) -> float:
    """Mean training loss (`loss/diffusion`) of labelled images at noise and timesteps that are the same for every row.

    Args:
        num: draws, spread evenly over the data set; draw i has its own noise and timestep.
    """
    objective, m = make_objective(config.diffusion, device), config.model
    gauss_N = np.random.default_rng(SCORE_SEED).standard_normal(num, dtype=np.float32)
    total = 0.0
    for start in range(0, num, batch):
        i_B = np.arange(start, min(start + batch, num))
        x_BCHW, label_B = data.get(i_B * len(data) // num)
        eps_BCHW = image_noise(SCORE_SEED, i_B, (m.channels, m.image_size, m.image_size))
        forward: Callable[..., Any] = lambda x, t, y=label_B: model(x, t, y)  # noqa: E731
        gauss_B = torch.from_numpy(gauss_N[i_B]).to(device)
        _, losses = objective.loss(forward, x_BCHW.to(device), eps_BCHW.to(device), gauss_B)
        total += float(losses["diffusion"]) * len(i_B)
    return total / num


def specialisation(model: DiT, config: Config, step: int) -> dict[str, float]:
    """What explains the choice of expert, I(group; expert) / H(expert) in [0, 1]: the mean over the MoE layers.

    `OBSERVED` images with noise of five timesteps, as in docs/analysis.md. `class_chance` is `class` with the classes
    shuffled between the images. Empty for a dense model.

    Args:
        config: of the model, with `data` to be looked at.
    """
    if config.moe is None:
        return {}
    o = observe(model, config, step, "run", Plan(images=OBSERVED, tokens=1, maps=0, batch=128))
    layers = range(len(o.blocks))
    each = {
        "class": [explained_entropy(o.count_LTCE[i].sum(0)) for i in layers],
        "class_chance": [chance_entropy(o.count_LIE[i], o.label_I, o.plan.seed) for i in layers],
        "timestep": [explained_entropy(o.count_LTCE[i].sum(1)) for i in layers],
        "position": [explained_entropy(o.count_LSE[i]) for i in layers],
        "load_max_over_mean": [float(max_over_mean(torch.from_numpy(o.count_LTCE.sum((1, 2))))[i]) for i in layers],
    }
    return {name: float(np.mean(values)) for name, values in each.items()}


def score_run(run: Path, standard: Standard, scales: list[float], num: int, steps: int | str) -> dict[str, Any]:
    """All scores of a run's newest checkpoint, ready for JSON.

    Args:
        scales: guidance scales to sample at.
        num: images per scale.
        steps: of the sampler.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, step = load_ema(run, device)
    judge, labels_N, batch = standard.judge, class_labels(num, config.model.num_classes), 256
    out: dict[str, Any] = {"judge": judge.name, "judge_accuracy": judge.accuracy}
    out["ema_loss"] = ema_loss(model, config, standard.data, standard.real, batch, device)
    out["experts"] = specialisation(model, replace(config, data=standard.where), step)
    for scale in scales:
        options = SamplingOptions(scale, steps, SCORE_SEED, batch)
        drawn = draw_batches(model, config, labels_N, np.arange(num), options, device)
        images_NHWC = np.concatenate([made for _, made in pixel_batches(drawn)])
        logits_NK = judge.logits(images_NHWC)
        out[f"cfg{scale}"] = {
            "fd": frechet_distance(*gaussian_statistics(judge.features(images_NHWC)), *standard.reference),
            "is": inception_score(logits_NK, split=num),
            "agreement": label_agreement(logits_NK, labels_N),
        }
    return out
