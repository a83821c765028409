"""A row of `paper_tables.py`, and what its runs have left on disk."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from promoe_ds.config.schema import Config

CHUNKS = 10
"""turns that a row's training is cut into"""
SCALES = [1.0, 1.5]
"""guidance scales"""


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called, what it computes (one config a seed), what the paper says of it."""

    label: str
    configs: tuple[Config, ...]
    runs: tuple[Path, ...]
    paper: dict[float, list[float]]
    """guidance scale -> FID50K, IS"""


def done_steps(run: Path) -> int:
    from promoe_ds.checkpoint.layout import newest, step_of

    found = newest(run)
    return step_of(found) if found else 0


def judge_file(args: argparse.Namespace) -> Path:
    return args.runs / args.data / f"judge-{args.judge_steps}.safetensors"


def scores(run: Path, config: Config, args: argparse.Namespace) -> dict[str, Any] | None:
    """What an earlier call has found for this checkpoint with as many images and sampler steps, by the same judge."""
    from benchmarks.label_cnn import judge_name

    path = run / "scores.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    judge = "digits-cnn" if args.data == "digits" else judge_name(judge_file(args))
    key = {"num": args.num, "step": done_steps(run), "sampler_steps": config.sample.steps, "judge": judge}
    return found if found and all(found.get(name) == value for name, value in key.items()) else None


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def throughput(run: Path, config: Config) -> float:
    """Median images/s over the windows of all chunks but the first of each, which is warm-up."""
    ends = {0, 1, *(-(-config.train.steps * chunk // CHUNKS) for chunk in range(1, CHUNKS + 1))}
    records = [{"step": 0}, *history(run)]
    rates = [now["images_per_s"] for before, now in pairwise(records) if before["step"] not in ends]
    return median(rates or [r["images_per_s"] for r in history(run)])
