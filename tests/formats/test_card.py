"""What a model card says of weights trained here and of weights from elsewhere; whose scores it shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.formats.card import model_card, score_rows
from promoe_ds.formats.importing import import_checkpoint
from promoe_ds.formats.weights import load, write
from promoe_ds.recipes.load import load_config
from tests.formats.official_model import HEADS
from tests.formats.test_official import save

FACTS = {"weights": "ema", "dtype": "fp32", "source": "step_00000007", "step": 7}


def test_imported_weights_do_not_claim_our_training(tmp_path: Path) -> None:
    """Nor after they were written, read and written again; trained here from them, the card says both."""
    overrides = [f"model.heads={HEADS}", "train.precision=fp32"]
    made = import_checkpoint(save(tmp_path / "ckpt_step_7.pth", "diffmoe"), overrides=overrides)
    write(made, tmp_path / "one")
    write(load(tmp_path / "one"), tmp_path / "two", "bf16")
    for name in ("one", "two"):
        card = (tmp_path / name / "README.md").read_text()
        assert "AdamW" not in card and "label drop" not in card and "`latents`" not in card, name
        assert "| training | not here: imported from `ckpt_step_7.pth`" in card and "after 7 steps" in card
        assert "`config.yaml`, its training options those of the recipe `imagenet256`" in card
    nameless = write(dataclasses.replace(made, step=0), tmp_path / "bare")
    assert "after an unknown number of steps" in (nameless / "README.md").read_text()
    tuned = model_card(load_config("digits", ["train.init=one"]), FACTS, None)
    assert "| training | AdamW lr" in tuned and "| started from | the weights `one` |" in tuned
    assert "| started from" not in model_card(load_config("digits"), FACTS, None)


def scores(step: int | None, **more: Any) -> dict[str, Any]:
    sampling = {} if step is None else {"checkpoint_step": step}
    return {"cfg": 1.5, "num": 1000, "FID": 3.25, "IS": None, "sampling": sampling} | more


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ([scores(7)], "- guidance 1.5, 1,000 images: FID 3.25"),
        ([scores(7), scores(4, FID=9.0)], "1 set of samples of step 4 left out."),
        ([scores(4), scores(5)], "None was recorded with these weights; 2 sets of samples of steps 4, 5 left out."),
        ([scores(None)], "- guidance 1.5, 1,000 images, of an unknown step: FID 3.25"),
        ([scores(7, cfg=None)], "- guidance unknown, 1,000 images: FID 3.25"),
        ([], "None was recorded with these weights."),
    ],
)
def test_scores_are_those_of_the_step(sets: list[dict[str, Any]], text: str) -> None:
    shown = score_rows({"sets": sets}, 7)
    assert text in shown and "FID 9" not in shown
