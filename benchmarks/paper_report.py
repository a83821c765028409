"""The finished rows of `paper_tables.py` as a markdown table beside the paper's, and as a figure."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.paper_rows import SCALES, Row, history, scores, throughput
from benchmarks.provenance import ROOT, provenance
from promoe_ds.costs.flops import count_parameters

Result = dict[str, Any]
"""what scores.json of a run holds"""


def results(row: Row, args: argparse.Namespace) -> list[Result]:
    pairs = zip(row.runs, row.configs, strict=True)
    return [found for run, config in pairs if (found := scores(run, config, args)) is not None]


def spread(values: list[float], digits: int) -> str:
    """Mean over seeds, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def paper_cells(row: Row) -> list[str]:
    return [f"{row.paper[s][i]:g}" if s in row.paper else "-" for s in SCALES for i in (0, 1)]


def table(rows: list[Row], args: argparse.Namespace) -> str:
    """One line a row: sizes, our scores, load and throughput, then the paper's FID50K and IS on ImageNet."""
    head = ["row", "activated M", "total M", "EMA loss"]
    head += [f"{name} cfg {s:g}" for s in SCALES for name in ("FD", "IS-like", "agreement")]
    head += ["load max/mean", "dead", "images/s"]
    head += [f"paper {name} cfg {s:g}" for s in SCALES for name in ("FID", "IS")]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for row in rows:
        found, counts = results(row, args), count_parameters(row.configs[0])
        last = [history(run)[-1] for run in row.runs]
        cells = [row.label, f"{counts.activated / 1e6:.2f}", f"{counts.total / 1e6:.2f}"]
        cells.append(spread([r["ema_loss"] for r in found], 4))
        for s in SCALES:
            one = [r[f"cfg{s}"] for r in found]
            cells += [spread([r["fd"] for r in one], 2), spread([r["is"] for r in one], 2)]
            cells.append(spread([r["agreement"] for r in one], 3))
        cells += [spread([r["load_max_over_mean"] for r in last], 2), spread([r["dead_experts"] for r in last], 1)]
        cells.append(spread([throughput(run, c) for run, c in zip(row.runs, row.configs, strict=True)], 0))
        lines.append(" | ".join([*cells, *paper_cells(row)]))
    return "\n".join(f"| {line} |" for line in lines)


def orderings(rows: list[Row], args: argparse.Namespace) -> str:
    """For each measure: our order from best to worst, and how many pairs of rows stand as in the paper."""
    by_cfg: Callable[[float], Callable[[Row], float]] = lambda s: (  # noqa: E731
        lambda row: mean(r[f"cfg{s}"]["fd"] for r in results(row, args))
    )
    measures = {"EMA loss": lambda row: mean(r["ema_loss"] for r in results(row, args))}
    measures |= {f"FD at guidance {s:g}": by_cfg(s) for s in SCALES}
    with_paper = [row for row in rows if 1.5 in row.paper]
    lines = []
    if with_paper:
        lines.append(f"- paper, FID50K at guidance 1.5: {_order(with_paper, lambda row: row.paper[1.5][0])}")
    for name, value in measures.items():
        pairs = [(a, b) for a, b in combinations(with_paper, 2) if a.paper[1.5][0] != b.paper[1.5][0]]
        agree = sum((a.paper[1.5][0] < b.paper[1.5][0]) == (value(a) < value(b)) for a, b in pairs)
        lines.append(
            f"- here, {name}: {_order(rows, value)}"
            + (f" ({agree} of {len(pairs)} pairs as in the paper)" if pairs else "")
        )
    return "\n".join(lines)


def _order(rows: list[Row], value: Callable[[Row], float]) -> str:
    return " < ".join(row.label for row in sorted(rows, key=value))


# ------------------------------------------------------------------------------------------------------------ figure


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    out = values[:1]
    for value in values[1:]:
        out.append(weight * out[-1] + (1 - weight) * value)
    return out


def draw(rows: list[Row], args: argparse.Namespace, path: Path) -> None:
    """Training loss over steps, FD at both guidance scales, load: one figure, one colour a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.3, 1, 1])
    places = range(len(rows))
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, row in enumerate(rows):
        records = history(row.runs[0])
        left.plot([r["step"] for r in records], smoothed([r["loss/diffusion"] for r in records]), color=colours[i % 10],
                  label=row.label)  # fmt: skip
        found = results(row, args)
        for s, shade, offset in ((SCALES[0], 1.0, -0.2), (SCALES[1], 0.5, 0.2)):
            fds = [r[f"cfg{s}"]["fd"] for r in found]
            middle.barh(i + offset, mean(fds), 0.36, color=colours[i % 10], alpha=shade,
                        xerr=[[mean(fds) - min(fds)], [max(fds) - mean(fds)]])  # fmt: skip
        rates = [throughput(run, c) for run, c in zip(row.runs, row.configs, strict=True)]
        right.barh(i, mean(rates), 0.7, color=colours[i % 10])
    left.set(xlabel="step", ylabel="diffusion loss (smoothed)", yscale="log")
    left.legend(fontsize=7)
    for axis, name in ((middle, "FD (dark: cfg 1.0, light: 1.5)"), (right, "images/s")):
        axis.set(xlabel=name, yticks=list(places), yticklabels=[])
        axis.invert_yaxis()
    middle.set_yticklabels([row.label for row in rows], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


# -------------------------------------------------------------------------------------------------------------- page


def write_report(rows: list[Row], args: argparse.Namespace) -> None:
    """Print the table, and write it with its figure to args.out."""
    caption = yaml.safe_load((ROOT / "benchmarks/paper_tables.yaml").read_text())["tables"][args.table]["caption"]
    name = f"paper_table{args.table}_{args.data}"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(rows, args, args.out / f"{name}.png")
    first, train = results(rows[0], args)[0], rows[0].configs[0].train
    seeds = ", ".join(map(str, args.seeds))
    text = f"""# Table {args.table} on {args.data}: {caption}

{provenance("benchmarks/paper_tables.py", args.command)}

Each row: {train.steps} steps (times its budget in the paper) of {train.global_batch_size} images, {train.precision},
seeds {seeds}, rows in turns. {args.num} images a guidance scale, {first["sampler_steps"]} sampler steps, scored by
{first["judge"]} (its accuracy on held-out reals is {first["judge_accuracy"]:.3f}): FD is the Frechet distance of its
features, IS-like the Inception score with its classes; neither compares with an FID50K of ImageNet, only their order
does. EMA loss: the diffusion loss of the EMA weights, with noise and timesteps equal for all rows. Load and dead
experts (over all MoE layers) are those of the last step; ± is half the range over seeds.

{table(rows, args)}

Order, best first:

{orderings(rows, args)}

![loss, FD and images/s of the rows]({name}.png)
"""
    (args.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
