from __future__ import annotations

import itertools

import pytest
import torch

from promoe_ds.diffusion.rectified_flow import interpolate, loss_per_image, shift_sigma, sigma_from_gauss, target


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_path_runs_from_data_to_noise() -> None:
    z, eps = draw(2, 3, 4, 4), draw(2, 3, 4, 4) + 1
    torch.testing.assert_close(interpolate(z, eps, torch.zeros(2, dtype=torch.float64)), z, rtol=0, atol=0)
    torch.testing.assert_close(interpolate(z, eps, torch.ones(2, dtype=torch.float64)), eps, rtol=0, atol=0)


def test_data_and_noise_are_recovered_from_state_and_velocity() -> None:
    z, eps, sigma = draw(5, 3, 4, 4), draw(5, 3, 4, 4) + 1, torch.linspace(0, 1, 5, dtype=torch.float64)
    x, v, s = interpolate(z, eps, sigma), target(z, eps), sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(x - s * v, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(x + (1 - s) * v, eps, rtol=0, atol=1e-14)


def test_velocity_is_the_derivative_of_the_path() -> None:
    z, eps, h = draw(1, 3, 4, 4), draw(1, 3, 4, 4) + 1, 1e-3
    ahead = interpolate(z, eps, torch.tensor([0.3 + h], dtype=torch.float64))
    behind = interpolate(z, eps, torch.tensor([0.3 - h], dtype=torch.float64))
    torch.testing.assert_close((ahead - behind) / (2 * h), target(z, eps), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.7)])
def test_levels_are_logit_normal(mean: float, std: float) -> None:
    """Quantiles: P(sigma <= s) = Phi((logit(s) - mean) / std), at evenly spaced quantiles of the draw."""
    probability = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = sigma_from_gauss(torch.special.ndtri(probability), mean, std)
    torch.testing.assert_close(torch.special.ndtr((torch.logit(sigma) - mean) / std), probability, rtol=0, atol=1e-12)


def test_shift_adds_its_logarithm_to_the_logit() -> None:
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = torch.sigmoid(torch.logit(u) + torch.tensor(3.0, dtype=torch.float64).log())
    torch.testing.assert_close(shift_sigma(u, 3.0), moved, rtol=0, atol=1e-14)
    torch.testing.assert_close(shift_sigma(u, 1.0), u, rtol=0, atol=0)
    gauss = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(sigma_from_gauss(gauss, shift=3.0), shift_sigma(torch.sigmoid(gauss), 3.0))


def test_levels_keep_float32() -> None:
    assert sigma_from_gauss(torch.zeros(3), 0.0, 1.0, 1.0).dtype == torch.float32


def test_loss_averages_elements_of_each_image_in_float32() -> None:
    prediction, wanted = draw(3, 4, 5, 5).bfloat16(), draw(3, 2, 5, 5) + 1
    loss = loss_per_image(prediction, wanted)
    by_hand = torch.zeros(3, dtype=torch.float64)
    for b, c, i, j in itertools.product(range(3), range(2), range(5), range(5)):
        by_hand[b] += (prediction[b, c, i, j].double() - wanted[b, c, i, j]) ** 2 / 50
    assert loss.dtype == torch.float32 and loss.shape == (3,)
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-6, atol=0)


def test_loss_ignores_the_learned_sigma_channels() -> None:
    prediction, wanted = draw(3, 4, 5, 5).requires_grad_(), draw(3, 2, 5, 5) + 9
    loss_per_image(prediction, wanted).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[:, 2:].abs().max() == 0 < prediction.grad[:, :2].abs().min()
