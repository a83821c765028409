"""The pages of paper_tables.py: scores with their spread, and a sign test of each of the paper's orderings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from statistics import mean
from typing import Any

from benchmarks.common import figure, page, table
from promoe_ds.config.schema import Config
from promoe_ds.costs.flops import count_parameters
from promoe_ds.utils.files import write_text

SCALES = [1.0, 1.5]
"""guidance scales"""
Scores = dict[str, Any]
"""what is kept of a run"""


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called, its runs (one per seed), and what the paper says of it."""

    label: str
    runs: tuple[str, ...]
    config: Config
    """of the first seed"""
    paper: dict[float, list[float]]
    """guidance scale -> FID50K, IS"""


@dataclass(frozen=True)
class Measure:
    """A score of which less is better, and the paper's scale whose order it is held against."""

    name: str
    of: Callable[[Scores], float]
    scale: float


MEASURES = [
    Measure("EMA loss", lambda scores: scores["ema_loss"], 1.5),
    *(Measure(f"FD at guidance {s:g}", lambda scores, s=s: scores[f"cfg{s}"]["fd"], s) for s in SCALES),
]
COLUMNS: list[tuple[str, int, Callable[[Scores], float | None]]] = [
    ("EMA loss", 4, lambda scores: scores["ema_loss"]),
    *(
        (f"{head} cfg {s:g}", digits, lambda scores, s=s, key=key: scores[f"cfg{s}"][key])
        for s in SCALES
        for key, head, digits in (("fd", "FD", 2), ("is", "IS-like", 2), ("agreement", "agreement", 3))
    ),
    ("load max/mean", 2, lambda scores: scores["load_max_over_mean"]),
    ("dead", 1, lambda scores: scores["dead_experts"]),
    *(
        (head, digits, lambda scores, key=key: scores["experts"].get(key))
        for key, head, digits in (
            ("class", "class", 3),
            ("class_chance", "by chance", 4),
            ("timestep", "timestep", 3),
            ("position", "position", 3),
        )
    ),
]
"""head, digits, value; None where a dense model has none"""


def over_seeds(values: Sequence[float | None], digits: int) -> str:
    """Mean over seeds, and half the range where there are several; a dash where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    half = (max(known) - min(known)) / 2
    return f"{mean(known):.{digits}f}" + (f" ± {half:.{digits}f}" if len(known) > 1 else "")


def scores_table(rows: list[Row], kept: dict[str, Scores]) -> str:
    """Sizes, our scores, load and specialisation, then the paper's FID50K and IS on ImageNet."""
    columns = ["row", "activated M", "total M", *(head for head, _, _ in COLUMNS)]
    columns += [f"paper {name} cfg {scale:g}" for scale in SCALES for name in ("FID", "IS")]
    lines = []
    for row in rows:
        count, found = count_parameters(row.config), [kept[name] for name in row.runs]
        line = [row.label, f"{count.activated / 1e6:.2f}", f"{count.total / 1e6:.2f}"]
        line += [over_seeds([value(scores) for scores in found], digits) for _, digits, value in COLUMNS]
        for scale in SCALES:
            line += [f"{value:g}" for value in row.paper[scale]] if scale in row.paper else ["-", "-"]
        lines.append(line)
    return table(columns, lines)


def sign_test(wins: int, seeds: int) -> float:
    """One-sided: how likely so many wins or more are, if each seed were a coin."""
    return sum(comb(seeds, k) for k in range(wins, seeds + 1)) / 2**seeds


def expected(a: Row, b: Row, scale: float) -> tuple[Row, Row, bool]:
    """(better, worse, whether the paper says so); of rows that it does not compare, the later one first."""
    if scale in a.paper and scale in b.paper and a.paper[scale][0] != b.paper[scale][0]:
        return (a, b, True) if a.paper[scale][0] < b.paper[scale][0] else (b, a, True)
    return b, a, False


def orderings(rows: list[Row], kept: dict[str, Scores]) -> str:
    """Each pair of rows: in how many seeds it stands as in the paper, by every measure."""
    lines = []
    stand = {measure.name: [0, 0] for measure in MEASURES}
    for a, b in combinations(rows, 2):
        usual = expected(a, b, 1.5)
        line = [usual[0].label, usual[1].label, "yes" if usual[2] else "not compared"]
        for measure in MEASURES:
            better, worse, known = told if (told := expected(a, b, measure.scale))[2] else (*usual[:2], False)
            gaps = [measure.of(kept[y]) - measure.of(kept[x]) for x, y in zip(better.runs, worse.runs, strict=True)]
            wins = sum(gap > 0 for gap in gaps)
            turned = " reversed" if better is not usual[0] else ""
            line.append(f"{wins}/{len(gaps)}{turned} (p {sign_test(wins, len(gaps)):.3g}, {mean(gaps):+.3g})")
            stand[measure.name][0] += known and mean(gaps) > 0
            stand[measure.name][1] += known
        lines.append(line)
    sums = [
        f"- {name}: the mean over seeds stands as in the paper in {n} of {number} pairs"
        for name, (n, number) in stand.items()
    ]
    return table(["better", "than", "in the paper", *stand], lines) + "\n\n" + "\n".join(sums)


def order(rows: list[Row], kept: dict[str, Scores]) -> str:
    """Rows from best to worst: the paper's and ours."""
    known = [row for row in rows if 1.5 in row.paper]
    ranks = [("paper, FID50K at guidance 1.5", sorted(known, key=lambda row: row.paper[1.5][0]))] if known else []
    for measure in MEASURES:
        value = lambda row, of=measure.of: mean(of(kept[name]) for name in row.runs)  # noqa: E731
        ranks.append((f"here, {measure.name}", sorted(rows, key=value)))
    return "\n".join(f"- {name}: {' < '.join(row.label for row in ranked)}" for name, ranked in ranks)


def accuracies(each: list[Scores]) -> str:
    """Accuracy of the judge; of each with its seeds, where runs come from several folders, which train one each."""
    seeds: dict[str, set[int]] = {}
    for scores in each:
        seeds.setdefault(f"{scores['judge_accuracy']:.3f}", set()).add(scores["seed"])
    if len(seeds) == 1:
        return next(iter(seeds))
    return " and ".join(f"{accuracy} (seed {', '.join(map(str, sorted(of)))})" for accuracy, of in seeds.items())


def method(rows: list[Row], kept: dict[str, Scores], args: argparse.Namespace) -> str:
    """How the figures came about, and what they cannot say."""
    train, first = rows[0].config.train, kept[rows[0].runs[0]]
    each = [kept[name] for row in rows for name in row.runs]
    hours = sum(scores["train_cpu_hours"] for scores in each)
    smallest = 0.5 ** len(args.seeds)
    return f"""\
Each row: {train.steps} steps (times its budget in the paper) of {train.global_batch_size} images, {train.precision},
seeds {", ".join(map(str, args.seeds))}, rows in turns; {hours:.1f} hours of CPU for training them all. Per guidance
scale {args.num} images of {first["sampler_steps"]} sampler steps, scored by {first["judge"]}, whose accuracy on
held-out reals is {accuracies(each)}. FD is the Frechet distance of its features, IS-like the Inception score
with its classes; neither compares with an FID50K of ImageNet, only their order does. EMA loss: the diffusion loss of
the EMA weights, with the same noise and timesteps for all rows. Load and dead experts (over all MoE layers) are means
over the last quarter of training. Class, timestep, position: the share of the choice of expert that each explains, I/H,
0 to 1; *by chance* is that of the class with the classes of the images shuffled. ± is half the range over seeds.

Orderings: in how many seeds the row that the paper has ahead is ahead here, with the one-sided p of a sign test and the
mean gap (above 0: as in the paper). With {len(args.seeds)} seed(s) no p is below {smallest:g}, and the comparisons are
many: no pair is significant by itself, and only a gap well above the spread of both rows means anything. This is one
small model, with one learning rate for all rows, on one small data set: the figures can say what shows at this size,
not what would at the paper's."""


def write_report(
    rows: list[Row], kept: dict[str, Scores], args: argparse.Namespace, number: str, caption: str, words: list[str]
) -> None:
    """Print the page of a table, and write it with its figure to args.out."""
    name = f"paper_table{number}_{args.data}"
    args.out.mkdir(parents=True, exist_ok=True)
    with figure(args.out / f"{name}.png", [1]) as (axis,):
        for row in rows:
            axis.plot(*zip(*kept[row.runs[0]]["curve"], strict=True), label=row.label)
        axis.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    text = page(
        f"Table {number} on {args.data}: {caption}",
        "benchmarks/paper_tables.py",
        words,
        method(rows, kept, args),
        scores_table(rows, kept),
        f"Order, best first:\n\n{order(rows, kept)}",
        orderings(rows, kept),
        f"![training loss of the rows]({name}.png)",
        measured=[kept[name]["facts"] for row in rows for name in row.runs],
    )
    write_text(args.out / f"{name}.md", text)
    print(text)
