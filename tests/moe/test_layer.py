"""The MoE layer against Algorithm 1 of the paper (arXiv:2510.24711), written as the slow loop it is, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from promoe_ds.moe.conditional_routing import Split, split_by_label
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import aux_losses_of
from promoe_ds.recipes.load import load_tree

D, S, NULL = 16, 5, 10
MIXES = {
    "mixed": [3, NULL, 1, 3, NULL, 7],
    "all conditional": [0, 1, 2, 3],
    "all null": [NULL, NULL, NULL],
    "one conditional image": [4],
    "one null image": [NULL],
}


def make_layer(dtype: torch.dtype, seed: int = 0, backend: str = "loop", **moe: object) -> MoELayer:
    tree = {"model": {"width": D, "heads": 4, "num_classes": NULL}, "moe": {"experts_backend": backend, **moe}}
    layer = MoELayer(load_tree(tree)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.gelu(x @ w1.T + b1, approximate="tanh") @ w2.T + b2


def algorithm_1(layer: MoELayer, x_BSD: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    """Token by token, expert by expert. Returns (O, unweighted L_RCL)."""
    cfg, experts = layer.router.config, layer.routed.experts  # type: ignore[union-attr]
    P, F_ = layer.router.prototypes, experts.hidden  # type: ignore[union-attr]
    out, assigned = [], []
    for image, label in zip(x_BSD, labels, strict=True):
        for x in image:
            o = torch.zeros_like(x)
            if label == NULL:  # step 2
                for u in layer.unconditional:
                    o = o + mlp(x, u.fc1.weight, u.fc1.bias, u.fc2.weight, u.fc2.bias)  # type: ignore[union-attr]
            else:
                z = torch.stack([cfg.alpha * (x @ p) / (x.norm() * p.norm()) for p in P])  # step 3, Eq. (4)
                s = {"identity": z, "sigmoid": z.sigmoid(), "softmax": z.softmax(0)}[cfg.activation]
                g, chosen = s.topk(cfg.top_k)
                for weight, i in zip(g, chosen.tolist(), strict=True):  # step 4
                    b1, b2 = experts.w3[i, 0, :F_], experts.w3[i, 0, F_:]
                    o = o + weight * mlp(x, experts.w1[i], b1, experts.w2[i], b2)
                    assigned.append((i, x))
            for s_ in layer.shared:  # step 6
                o = o + mlp(x, s_.fc1.weight, s_.fc1.bias, s_.fc2.weight, s_.fc2.bias)  # type: ignore[union-attr]
            out.append(o)
    return torch.stack(out).view_as(x_BSD), contrastive(P, assigned, cfg.temperature)


def contrastive(P: Tensor, assigned: list[tuple[int, Tensor]], temperature: float) -> Tensor:
    """Eq. (6): only experts with tokens; 0 with fewer than two of them."""
    present = sorted({i for i, _ in assigned})
    if len(present) < 2:
        return P.sum() * 0
    centroid = {i: torch.stack([x for j, x in assigned if j == i]).mean(0) for i in present}
    similar = {(i, j): F.cosine_similarity(P[i], centroid[j], dim=0) / temperature for i in present for j in present}
    terms = [similar[i, i] - torch.logsumexp(torch.stack([similar[i, j] for j in present]), 0) for i in present]
    return -torch.stack(terms).mean()


def split_of(labels: list[int]) -> Split:
    return split_by_label(torch.tensor(labels), NULL, "cpu")


def losses_of(layer: MoELayer, terms: dict[str, Tensor], offsets_E: Tensor) -> dict[str, Tensor]:
    """The auxiliary losses of one layer alone, scalars."""
    losses = aux_losses_of(layer.router, [terms], tokens_per_expert(offsets_E)[None])  # type: ignore[arg-type]
    return {name: loss_L.squeeze(0) for name, loss_L in losses.items()}


def run(layer: MoELayer, x: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    """The layer as the model calls it: images reordered, restored after."""
    split = split_of(labels)
    out, (terms, offsets_E, _) = layer(x[split.order_B], split)
    count_E = tokens_per_expert(offsets_E)
    conditional = sum(label != NULL for label in labels)
    assert count_E.sum() == conditional * S * layer.router.config.top_k  # type: ignore[union-attr]
    return out[split.restore_B], losses_of(layer, terms, offsets_E)["routing_contrastive"]


def gradients(layer: MoELayer, x: Tensor, out: Tensor, aux: Tensor) -> list[Tensor]:
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * probe).sum() + 0.7 * aux, [x, *layer.parameters()], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [x, *layer.parameters()], strict=True)]


@pytest.mark.parametrize("labels", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_output_and_every_gradient_equal_algorithm_1(top_k: int, activation: str, labels: list[int]) -> None:
    router = {"top_k": top_k, "activation": activation, "alpha": 1.7}
    layer = make_layer(torch.float64, router=router, num_shared=2, num_unconditional=2)
    x = torch.randn(len(labels), S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    out, aux = run(layer, x, labels)
    expected, expected_aux = algorithm_1(layer, x, labels)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(aux, expected_aux, rtol=1e-11, atol=1e-11)
    for ours, slow in zip(gradients(layer, x, out, aux), gradients(layer, x, expected, expected_aux), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-10)


def test_empty_experts_are_exercised() -> None:
    """The mixes above really contain experts without tokens, and those have zero, not missing, gradients."""
    layer = make_layer(torch.float32, backend="grouped_mm")
    x = torch.randn(1, S, D, requires_grad=True)
    split = split_of([4])
    out, (terms, offsets_E, _) = layer(x, split)
    count_E = tokens_per_expert(offsets_E)
    assert (count_E == 0).any()
    (out.sum() + losses_of(layer, terms, offsets_E)["routing_contrastive"]).backward()
    weights = layer.routed.experts.w1  # type: ignore[union-attr]
    assert weights.grad is not None and (weights.grad[count_E == 0] == 0).all()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("labels", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("top_k", [1, 3])
def test_backends_agree(top_k: int, labels: list[int]) -> None:
    results = []
    for backend in ("loop", "grouped_mm"):
        layer = make_layer(torch.float32, backend=backend, router={"top_k": top_k})
        x = torch.randn(len(labels), S, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out, aux = run(layer, x, labels)
        results.append([out, *gradients(layer, x, out, aux)])
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(loop, grouped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_autocast_computes_experts_in_bf16_and_routes_in_fp32(backend: str) -> None:
    layer = make_layer(torch.float32, backend=backend)
    x = torch.randn(4, S, D)
    split = split_of([1, 2, 3, NULL])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, (terms, offsets_E, _) = layer(x, split)
        count_E = tokens_per_expert(offsets_E)
        loss = losses_of(layer, terms, offsets_E)["routing_contrastive"]
        routing = layer.router(x[:3].flatten(0, 1), x.shape[1], split)
    reference, (_, reference_end_E, _) = layer(x, split)
    reference_count_E = tokens_per_expert(reference_end_E)
    assert routing.weight_N.dtype == torch.float32 and loss.dtype == torch.float32
    assert torch.equal(count_E, reference_count_E)  # bf16 scores would flip some
    assert 0 < (out - reference).abs().max() < 0.05 * reference.abs().max()


def test_without_the_conditional_split_every_image_is_routed() -> None:
    layer = make_layer(torch.float32, conditional=False)
    assert len(layer.unconditional) == 0
    split = split_of([1, NULL, NULL])
    _, (_, offsets_E, _) = layer(torch.randn(3, S, D), split)
    count_E = tokens_per_expert(offsets_E)
    assert count_E.sum() == 3 * S


def test_no_auxiliary_loss_outside_training() -> None:
    layer = make_layer(torch.float32).eval()
    split = split_of([1, 2])
    _, (terms, offsets_E, _) = layer(torch.randn(2, S, D), split)
    assert terms == {} and losses_of(layer, terms, offsets_E) == {}


class Operations(TorchDispatchMode):
    """Names of every operator that runs, in the forward and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def waiting(self) -> list[str]:
        """Those that read a value on the host, whose output's size depends on one, or that communicate."""
        words = "_local_scalar_dense aten.nonzero bincount unique masked_select is_nonzero c10d".split()
        return [name for name in self.names if any(word in name for word in words)]


def test_no_host_synchronisation_and_no_collective_at_ep_1() -> None:
    layer = make_layer(torch.float32, backend="grouped_mm")
    split = split_of([3, 1, NULL])
    x = torch.randn(3, S, D, requires_grad=True)
    with Operations() as operations:
        out, (terms, offsets_E, _) = layer(x, split)
        (out.sum() + losses_of(layer, terms, offsets_E)["routing_contrastive"]).backward()
    assert any("grouped_mm" in name for name in operations.names)
    assert not operations.waiting()
    with Operations() as operations:  # the mode does see a synchronisation where there is one
        make_layer(torch.float32, backend="loop")(x, split)[0].sum().item()
    assert any("_local_scalar_dense" in name for name in operations.waiting())
