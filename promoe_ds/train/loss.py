"""The training loss from its terms: L = Eq. (1) + lambda * Eq. (6) of arXiv:2510.24711, and what else a router adds."""

from __future__ import annotations

from torch import Tensor

from promoe_ds.models.dit import DiTOutput
from promoe_ds.train.nonfinite import RankFailed


def total_loss(losses: dict[str, Tensor], output: DiTOutput, weights: dict[str, float]) -> list[Tensor]:
    """[total, diffusion loss, auxiliary losses in the order of `weights`], scalars; a router's summed over layers.

    Args:
        losses: of the objective, "diffusion" among them.
        output: of the same forward; holds the routers' losses.
        weights: of every auxiliary loss.

    Raises:
        RankFailed: a router returns a loss that it does not name, or names one that it does not return.
    """
    total, aux = losses["diffusion"], losses | {name: loss_L.sum() for name, loss_L in output.aux_losses.items()}
    if extra := sorted(output.aux_losses.keys() - weights.keys()):
        raise RankFailed(f"the router's losses() return {extra[0]!r}: name it in aux_loss_weights, at 0 only to log it")
    for name, weight in weights.items():
        if name not in losses and (
            name not in output.aux_losses or output.aux_losses[name].shape != output.tokens_per_expert_LE.shape[:1]
        ):
            raise RankFailed(
                f"the router's aux_loss_weights name a loss {name!r}: its losses() must return it, one value per MoE "
                "layer, and its forward the terms of it"
            )
        total = total + weight * aux[name]
    return [total, losses["diffusion"], *(aux[name] for name in weights)]
