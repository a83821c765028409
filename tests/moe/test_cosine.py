"""The score of prototypical routing and its gradient, against PyTorch's own cosine in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.moe.cosine import cosine


def test_cosine_and_its_gradients_are_those_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(9, 5, generator=generator, dtype=torch.float64).requires_grad_()
    p_ED = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    grad_TE = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ours, theirs = cosine(x_TD, F.normalize(p_ED).T), F.cosine_similarity(x_TD[:, None], p_ED, dim=-1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(z, [x_TD, p_ED], grad_TE) for z in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x, p: cosine(x, F.normalize(p).T), (x_TD, p_ED))
    (slope,) = torch.autograd.grad(cosine(x_TD, F.normalize(p_ED).T).square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # not a wrong second derivative
        slope.sum().backward()


def test_a_token_that_is_0_has_score_0_and_the_gradient_of_the_quotient() -> None:
    x_TD = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    unit_DE = torch.eye(3, dtype=torch.float64)
    z_TE = cosine(x_TD, unit_DE)
    assert (z_TE == 0).all()
    quotient = x_TD @ unit_DE / torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).clamp_min(1e-12)
    for a, b in zip(*(torch.autograd.grad(z.sum(), x_TD) for z in (z_TE, quotient)), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert cosine(x_TD[:0], unit_DE).shape == (0, 3)
