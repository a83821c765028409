"""DDPM with a learned variance range, trained on MSE + VB (Improved DDPM, arXiv:2102.09672; ADM, arXiv:2105.05233).

Legend: B images, C channels, H W side, T timesteps of a schedule, t in 0..T-1 (0 is the least noisy). z is an image (or
latent), eps standard normal noise, x = x_t the noisy image; ab = alpha_bar. "DDPM" below is arXiv:2006.11239, "iDDPM"
arXiv:2102.09672. Tables are float64; what is taken out of them has the dtype of the images, and is exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

TIME_SCALE = 1000.0
"""the model is given 1000 t / T: t itself for the usual T = 1000"""
VB_LAMBDA = 1e-3
"""lambda of L_hybrid = L_simple + lambda L_vlb (iDDPM eq. 16)"""
HALF_LEVEL = 1 / 255
"""half the distance of two grey levels, which lie at -1, -1 + 2/255, ..., 1"""
TINY_PROBABILITY = 1e-12
"""floor of a grey level's probability: keeps its logarithm and gradient finite"""


def linear_betas(num_steps: int) -> Tensor:
    """beta_t, float64 [T > 20]: from 1e-4 to 0.02 (DDPM Sec. 4) at T = 1000; scaled by 1000 / T at another length."""
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule: tables over t, all float64 [T] on one device."""

    beta_T: Tensor
    alpha_bar_T: Tensor
    """product of 1 - beta up to t"""
    alpha_bar_before_T: Tensor
    """alpha_bar of t - 1; 1 at t = 0"""
    posterior_variance_T: Tensor
    """beta-tilde, DDPM eq. 7; 0 at t = 0"""
    posterior_log_variance_T: Tensor
    """its logarithm, where t = 0 takes the value of t = 1 (iDDPM's code; the lower end of the learned range)"""
    time_T: Tensor
    """what the model is told, in [0, 1000): 1000 / T times the timestep of the *trained* schedule"""

    @property
    def num_steps(self) -> int:
        return len(self.beta_T)

    @staticmethod
    def of(beta_T: Tensor, time_T: Tensor | None = None) -> Schedule:
        """The tables of any betas, float64 [T]; without times t is told as 1000 t / T."""
        ab_T = torch.cumprod(1 - beta_T, 0)
        before_T = torch.cat([torch.ones_like(ab_T[:1]), ab_T[:-1]])
        variance_T = beta_T * (1 - before_T) / (1 - ab_T)
        floor = variance_T[1:2] if len(beta_T) > 1 else beta_T  # one step adds no noise: only finiteness matters
        if time_T is None:
            time_T = torch.arange(len(beta_T), dtype=torch.float64) * (TIME_SCALE / len(beta_T))
        return Schedule(beta_T, ab_T, before_T, variance_T, torch.cat([floor, variance_T[1:]]).log(), time_T)

    def respaced(self, kept: Sequence[int]) -> Schedule:
        """The schedule that visits only the timesteps `kept` (increasing), with the same alpha_bar at each.

        beta_i = 1 - ab_i / ab_(i-1) over the kept ones (iDDPM eq. 19); the model is told the original timesteps.
        """
        index_K = torch.tensor(list(kept), device=self.beta_T.device)
        ab_K = self.alpha_bar_T[index_K]
        before_K = torch.cat([torch.ones_like(ab_K[:1]), ab_K[:-1]])
        return Schedule.of(1 - ab_K / before_K, self.time_T[index_K])

    def to(self, device: torch.device) -> Schedule:
        return Schedule(*(getattr(self, f.name).to(device) for f in fields(self)))


def at(table_T: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
    """table[t] for each image, [B, 1, 1, 1] in the dtype of `like`."""
    return table_T.index_select(0, t_B).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def timestep_from_gauss(gauss_B: Tensor, num_steps: int) -> Tensor:
    """Uniform timesteps from the per-image normal draw: Phi(g) is uniform in (0, 1), so floor(T Phi(g)) is in 0..T-1.

    In float64, where the last bit of Phi, which may depend on the vector unit, decides about one draw in 1e13: in
    float32 it would decide often enough for two topologies to disagree.

    Returns:
        int64 [B].
    """
    u_B = torch.special.ndtr(gauss_B.double())
    return (u_B * num_steps).long().clamp(max=num_steps - 1)


def q_sample(schedule: Schedule, z_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t = sqrt(ab) z + sqrt(1 - ab) eps (DDPM eq. 4), [B, C, H, W]."""
    ab = at(schedule.alpha_bar_T, t_B, z_BCHW)
    noise = at(1 - schedule.alpha_bar_T, t_B, z_BCHW)
    return ab.sqrt() * z_BCHW + noise.sqrt() * eps_BCHW


def image_of(schedule: Schedule, x_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The z that `q_sample` would have started from: (x - sqrt(1 - ab) eps) / sqrt(ab)."""
    ab_T = schedule.alpha_bar_T
    return at(ab_T.rsqrt(), t_B, x_BCHW) * x_BCHW - at((1 / ab_T - 1).sqrt(), t_B, x_BCHW) * eps_BCHW


def posterior_mean(schedule: Schedule, z_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Mean of q(x_(t-1) | x_t, z), DDPM eq. 7, [B, C, H, W]; z itself at t = 0."""
    s = schedule
    of_z_T = s.beta_T * s.alpha_bar_before_T.sqrt() / (1 - s.alpha_bar_T)
    of_x_T = (1 - s.beta_T).sqrt() * (1 - s.alpha_bar_before_T) / (1 - s.alpha_bar_T)
    return at(of_z_T, t_B, x_BCHW) * z_BCHW + at(of_x_T, t_B, x_BCHW) * x_BCHW


class Reverse(NamedTuple):
    """p(x_(t-1) | x_t) of a model, each [B, C, H, W] in the dtype of x."""

    mean: Tensor
    log_variance: Tensor
    image: Tensor
    """the predicted z, after clipping"""


def reverse(schedule: Schedule, prediction: Tensor, x_BCHW: Tensor, t_B: Tensor, clip: bool = False) -> Reverse:
    """The model's step: mean from its eps, log variance v log beta + (1 - v) log beta-tilde (iDDPM eq. 15).

    Args:
        prediction: [B, 2C, H, W] of any float dtype: eps, then w with v = (w + 1) / 2, not confined to [0, 1].
        clip: clip the predicted image to [-1, 1] before its mean is taken.
    """
    eps, w = prediction.to(x_BCHW.dtype).chunk(2, dim=1)
    image = image_of(schedule, x_BCHW, eps, t_B)
    image = image.clamp(-1, 1) if clip else image
    low = at(schedule.posterior_log_variance_T, t_B, x_BCHW)
    high = at(schedule.beta_T.log(), t_B, x_BCHW)
    v = (w + 1) / 2
    return Reverse(posterior_mean(schedule, image, x_BCHW, t_B), v * high + (1 - v) * low, image)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians in nats, elementwise; the arguments broadcast."""
    apart = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2) + apart)


def decoder_log_likelihood(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln p(z | x_1) of DDPM eq. 13, elementwise: the Gaussian's mass between the borders of z's grey level.

    The outermost of the 256 levels reach to infinity. The normal distribution function is exact, where iDDPM's code
    approximates it by tanh, and the mass is differenced in the lower tail, where float32 is fine enough.
    """
    away, scale = z - mean, torch.exp(-0.5 * log_variance)
    near, far = (HALF_LEVEL - away.abs()) * scale, (-HALF_LEVEL - away.abs()) * scale
    inside = torch.special.ndtr(near) - torch.special.ndtr(far)
    mass = torch.where(z < -0.999, torch.special.ndtr((away + HALF_LEVEL) * scale), inside)
    mass = torch.where(z > 0.999, torch.special.ndtr((HALF_LEVEL - away) * scale), mass)
    return mass.clamp(min=TINY_PROBABILITY).log()


def vb_per_image(schedule: Schedule, prediction: Tensor, z_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """L_t of the variational bound (iDDPM eq. 4-6), bits per dimension, float [B]: KL, at t = 0 the decoder's -ln p."""
    ours = reverse(schedule, prediction, x_BCHW, t_B)
    truth_mean = posterior_mean(schedule, z_BCHW, x_BCHW, t_B)
    truth_log_variance = at(schedule.posterior_log_variance_T, t_B, x_BCHW)
    kl = normal_kl(truth_mean, truth_log_variance, ours.mean, ours.log_variance)
    nll = -decoder_log_likelihood(z_BCHW, ours.mean, ours.log_variance)
    first = (t_B == 0).view(-1, *[1] * (x_BCHW.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)  # both are computed: no rank asks its device


def losses_per_image(
    schedule: Schedule, prediction: Tensor, z_BCHW: Tensor, eps_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor]:
    """L_simple and L_t, each float [B]; L_hybrid is the mean of the first plus lambda T times that of the second.

    L_simple = |eps - eps_theta|^2, averaged over C*H*W. L_t sees eps_theta detached, so the bound trains the variance
    and leaves the mean to L_simple (iDDPM Sec. 3.1).

    Args:
        prediction: [B, 2C, H, W] of any float dtype: eps, then the variance channels of `reverse`.
    """
    prediction = prediction.to(x_BCHW.dtype)
    eps_hat, w = prediction.chunk(2, dim=1)
    mse_B = (eps_BCHW - eps_hat).square().flatten(1).mean(1)
    frozen = torch.cat([eps_hat.detach(), w], dim=1)
    return mse_B, vb_per_image(schedule, frozen, z_BCHW, x_BCHW, t_B)
