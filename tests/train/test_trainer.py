"""What the trainer feeds the model and asks of it, recomputed from the batch by the formulas of rectified flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds.checkpoint import layout
from promoe_ds.config.errors import ConfigError
from promoe_ds.data import build_dataset
from promoe_ds.data.batches import BatchMaker
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.dit import DiTOutput
from promoe_ds.recipes.load import load_config
from promoe_ds.train.trainer import RankFailed, Trainer


class Captured:
    """Stands where the engine is: keeps the inputs, answers with a fixed prediction and auxiliary loss."""

    def __call__(self, x_BCHW: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor, row_B: torch.Tensor) -> DiTOutput:
        self.x, self.t, self.y, self.row = x_BCHW, t_B, y_B, row_B
        self.prediction = torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(0))
        return DiTOutput(self.prediction, {"routing_contrastive": torch.tensor([1.0, 2.0])}, torch.zeros(2, 12), [])


def test_loss_is_flow_matching_plus_weighted_auxiliary_losses() -> None:
    overrides = ["moe.router.contrastive_weight=0.5", "diffusion.shift=2", "diffusion.logit_mean=0.3"]
    config = load_config("tiny", overrides)
    trainer = object.__new__(Trainer)  # no process group needed for one forward
    trainer.config, trainer.engine = config, Captured()  # type: ignore[assignment]
    trainer.topology = type("T", (), {"device": torch.device("cpu")})()  # type: ignore[assignment]
    trainer.objective = make_objective(config.diffusion)
    trainer.aux_loss_weights = {"routing_contrastive": 0.5}
    (batch,) = BatchMaker(config, build_dataset(config)).step(3)
    _, (total, diffusion, contrastive) = trainer._forward(batch)
    seen: Any = trainer.engine

    u = 1 / (1 + torch.exp(-(0.3 + batch.gauss_B.double())))
    sigma = 2 * u / (1 + u)  # shift u / (1 + (shift - 1) u)
    torch.testing.assert_close(seen.t.double(), 1000 * sigma, rtol=1e-5, atol=1e-3)
    w = sigma[:, None, None, None]
    noisy = (1 - w) * batch.x_BCHW.double() + w * batch.noise_BCHW.double()
    torch.testing.assert_close(seen.x.double(), noisy, rtol=1e-5, atol=1e-5)
    velocity = batch.noise_BCHW - batch.x_BCHW
    expected = (seen.prediction - velocity).square().mean()
    torch.testing.assert_close(diffusion, expected)
    torch.testing.assert_close(total, expected + 0.5 * 3.0)
    assert contrastive == 3.0
    assert torch.equal(seen.y, batch.label_B) and torch.equal(seen.row, batch.rows)
    trainer.aux_loss_weights = {}
    with pytest.raises(RankFailed, match=r"losses\(\) return 'routing_contrastive': name it in aux_loss_weights"):
        trainer._forward(batch)
    trainer.aux_loss_weights = {
        "routing_contrastive": 0.5,
        "surprise": 1.0,
    }  # a router that was written for other names
    with pytest.raises(
        RankFailed, match=r"aux_loss_weights name a loss 'surprise': its losses\(\) must return it, one"
    ):
        trainer._forward(batch)


def test_a_claimed_folder_is_free_again_when_its_owner_ends(tmp_path: Path) -> None:
    lock = layout.claim(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training in it"):
        layout.claim(tmp_path / "run")
    lock.close()
    layout.claim(tmp_path / "run").close()
