"""Scores of a trained run on small real data: EMA loss, FD, an Inception-like score, label agreement.

Legend: N images, B images of a batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from promoe_ds.checkpoint.load_weights import load_ema
from promoe_ds.config.schema import Config
from promoe_ds.data import ImageDataset
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.evaluation.features import Features
from promoe_ds.evaluation.images import Images
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics, label_agreement
from promoe_ds.models.dit import DiT
from promoe_ds.sampling.generate import How, class_labels, draw_pixels, image_noise, to_pixels

SCORE_SEED = 1234
"""of the noise and the timesteps that every row is scored with"""


class Judge(Protocol):
    """A classifier of the data at hand: distances are taken between its features."""

    name: str
    accuracy: float

    def features(self, images_NHWC: Images) -> Features: ...

    def logits(self, images_NHWC: Images) -> Features: ...


def classifier_score(logits_NK: np.ndarray) -> float:
    """exp of the mean KL(p(y|x) || p(y)), in [1, K]: the Inception score (arXiv:1606.03498) with another classifier."""
    log_NK = torch.from_numpy(logits_NK).double().log_softmax(dim=1)
    marginal_K = log_NK.exp().mean(dim=0).log()
    return math.exp(float((log_NK.exp() * (log_NK - marginal_K)).sum(dim=1).mean()))


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
        _, losses = objective.loss(
            forward, x_BCHW.to(device), eps_BCHW.to(device), torch.from_numpy(gauss_N[i_B]).to(device)
        )
        total += float(losses["diffusion"]) * len(i_B)
    return total / num


def reference_images(data: ImageDataset, num: int) -> Images:
    """Up to `num` real images, spread evenly over the data set, as uint8 NHWC."""
    index = np.arange(min(num, len(data))) * len(data) // min(num, len(data))
    return to_pixels(data.get(index)[0])


def score_run(
    run: Path, judge: Judge, data: ImageDataset, scales: list[float], num: int, steps: int | str, device: torch.device
) -> dict[str, Any]:
    """All scores of a run's newest checkpoint, ready for JSON.

    Args:
        data: of the EMA loss and of the reference of FD.
        scales: guidance scales to sample at.
        num: images a scale, and draws of the EMA loss.
        steps: of the sampler.
    """
    model, config, step = load_ema(run, device)
    reference = gaussian_statistics(judge.features(reference_images(data, 10_000)))
    labels_N, batch = class_labels(num, config.model.num_classes), 256
    out: dict[str, Any] = {"step": step, "sampler_steps": steps}
    out["ema_loss"] = ema_loss(model, config, data, num, batch, device)
    for scale in scales:
        how = How(scale, steps, SCORE_SEED, batch)
        images_NHWC = draw_pixels(model, config, labels_N, np.arange(num), how, device)
        logits_NK = judge.logits(images_NHWC)
        out[f"cfg{scale}"] = {
            "fd": frechet_distance(*gaussian_statistics(judge.features(images_NHWC)), *reference),
            "is": classifier_score(logits_NK),
            "agreement": label_agreement(logits_NK, labels_N),
        }
    return out
