"""The bytes that a real job of two processes sends, as its meter counts them, are the formulas'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from promoe_ds.costs import comm_volume
from promoe_ds.parallel.ds_config import SHIPPED, ZERO_REFUSED
from promoe_ds.recipes.load import load_config
from tests.launch import run, torchrun

OWNER = "use_multi_rank_bucket_allreduce"
SWITCHED = {
    name: not field.default
    for name, field in DeepSpeedZeroConfig.model_fields.items()
    if field.annotation is bool and not field.alias and name not in ZERO_REFUSED and name != OWNER
}
"""every switch that a ds_config may set at stages 1 and 2, set otherwise than DeepSpeed does"""
OTHERS: dict[str, Any] = {
    "overlap_comm": True,
    "round_robin_gradients": True,
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "offload_optimizer": {"device": "cpu"},
}


def test_bytes_whatever_a_ds_config_may_say(tmp_path: Path) -> None:
    """Two micro-batches a step: stage 2 sends the gradients of each, stage 1 their sum. Sizes of parameters are odd."""
    overrides = ["train.steps=2", "train.measure=true", "train.micro_batch_size=8", "sample.steps=1"]
    overrides += ["parallel.expert_parallel=1", "moe.hidden_ratio=1.03125", "moe.experts_backend=loop"]
    cases = {"switched": SWITCHED, "others": OTHERS, "owner": OTHERS | {OWNER: False}}
    work = []
    for stage in (1, 2):
        for name, keys in cases.items():
            file = tmp_path / f"{name}{stage}.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": stage, **keys}}))
            work.append((file.stem, str(file), *overrides))
    run(torchrun(2, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
    config, losses = load_config("tiny", overrides), set()
    for stage in (1, 2):
        for name in cases:
            record = json.loads((tmp_path / f"{name}{stage}" / "metrics.jsonl").read_text().splitlines()[-1])
            resolved = json.loads((tmp_path / f"{name}{stage}" / "ds_config.json").read_text())
            gradients = comm_volume.gradients(config, 2, 1, stage, comm_volume.all_reduces(resolved))
            expected = gradients, comm_volume.parameters(config, 2, 1, stage)
            assert (record["bytes/gradients"], record["bytes/parameters"]) == expected, (name, stage)
            losses.add(round(record["loss"], 5))
        assert 2 * gradients == comm_volume.gradients(config, 2, 1, stage, multi_rank=True) > 0
    assert len(losses) == 1


def test_shipped_files_reduce_each_gradient_to_its_owner(tmp_path: Path) -> None:
    """Half the bytes of DeepSpeed's default, which is the least there is, and the same losses."""
    cases = [("zero1", 2), ("zero2", 4), ("zero2_offload", 1)]
    work, overrides = [], ["train.steps=2", "model.depth=2", "train.measure=true", "sample.steps=1"]
    for stem, ep in cases:
        tree = json.loads((SHIPPED / f"{stem}.json").read_text())
        tree["zero_optimization"][OWNER] = True
        (tmp_path / f"{stem}.json").write_text(json.dumps(tree))
        for name, ds in (("owner", stem), ("all", str(tmp_path / f"{stem}.json"))):
            work.append((f"{stem}_{ep}_{name}", ds, *overrides, f"parallel.expert_parallel={ep}"))
    run(torchrun(4, "tests/distributed/train_worker.py", str(tmp_path), json.dumps(work)))
    config = load_config("tiny", overrides)
    for stem, ep in cases:
        owner, everyone = (
            [json.loads(line) for line in (tmp_path / f"{stem}_{ep}_{name}" / "metrics.jsonl").read_text().splitlines()]
            for name in ("owner", "all")
        )
        least = comm_volume.gradients(config, 4, ep, int(stem[4]))
        sent = [{record["bytes/gradients"] for record in records} for records in (owner, everyone)]
        assert sent == [{least}, {2 * least}], (stem, ep)
        for x, y in zip(owner, everyone, strict=True):
            assert abs(x["loss"] - y["loss"]) <= 1e-6 * y["loss"], (stem, ep)
