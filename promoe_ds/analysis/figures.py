"""The figures of the report, as PNG bytes: small enough for a phone, one idea each.

Legend: as in `collect`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from promoe_ds.analysis.collect import Observed
from promoe_ds.analysis.summary import Summary
from promoe_ds.utils.pictures import expert_colours, token_maps

STYLE: Any = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
"""of matplotlib, while figures are made"""
DPI = 120
MOST_CLASSES = 20
"""rows of a figure by class; the CSV has all"""
MOST_LAYERS = 6
"""panels of a figure by layer; the CSV has all"""


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    return stream.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _heat(width: float, height: float, values: np.ndarray, bar: str = "", **style: Any) -> tuple[Figure, Axes]:
    """A matrix as colours, experts to the right; `bar` is the label of the colour bar."""
    figure, (ax,) = _figure(width, height)
    figure.colorbar(ax.imshow(values, **style), ax=ax, label=bar)
    ax.set(xlabel="expert")
    return figure, ax


def spread(number: int, most: int) -> list[int]:
    """At most `most` of 0..number-1, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, number - 1, min(number, most)).tolist()})


def training(records: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss and the evenness of the load over the steps of metrics.jsonl."""
    figure, (top, bottom) = _figure(5, 4.2, 2)
    kept = [r for r in records if isinstance(r.get("loss/diffusion"), int | float)]
    top.plot([r["step"] for r in kept], [r["loss/diffusion"] for r in kept], color="#1f77b4")
    top.set(ylabel="diffusion loss", yscale="log")
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    top.yaxis.set_minor_formatter("{x:g}")
    loads = [r.get("load_max_over_mean", np.nan) for r in records]
    bottom.plot([r["step"] for r in records], loads, color="#d62728")
    bottom.set(xlabel="step", ylabel="load max/mean")
    return _png(figure)


def router_gradients(records: Sequence[Mapping[str, Any]]) -> bytes:
    """`router_grad_norm` over the steps of metrics.jsonl: a line per MoE layer, the first dark, the last bright."""
    figure, (ax,) = _figure(5, 3.4)
    blocks, steps = records[-1]["layers"]["block"], [r["step"] for r in records]
    norm_LR = np.array([r["layers"]["router_grad_norm"] for r in records], float).T  # None is a gap
    for block, norm_R, shade in zip(blocks, norm_LR, np.linspace(0, 0.9, len(blocks)), strict=True):
        ax.plot(steps, norm_R, color=colormaps["viridis"](shade), label=str(block))
    ax.set(xlabel="step", ylabel="router gradient norm", yscale="log")
    ax.legend(title="block", frameon=False, fontsize=8, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _png(figure)


def load(o: Observed) -> bytes:
    """Layers downwards, experts to the right: the share of each expert times E."""
    tokens_per_expert_LE = o.count_LTCE.sum((1, 2)).astype(float)
    ratio = tokens_per_expert_LE / np.maximum(tokens_per_expert_LE.mean(1, keepdims=True), 1e-12)
    darkest = max(2.0, float(ratio.max()))
    figure, ax = _heat(5, 1.4 + 0.32 * len(ratio), ratio, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    if ratio.size <= 72:
        for (y, x), value in np.ndenumerate(ratio):
            colour = "white" if value > 0.6 * darkest else "black"
            ax.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set(ylabel="block", yticks=range(len(o.blocks)), yticklabels=map(str, o.blocks))
    ax.set_title("tokens of an expert over the mean")
    return _png(figure)


def use(o: Observed, layer: int, by: str, title: str = "") -> bytes:
    """Rows are classes or timesteps, columns experts: the share of a row's tokens at each expert."""
    count_GE = o.count_LTCE[layer].sum(0 if by == "class" else 1)
    names = o.classes if by == "class" else [f"{t:g}" for t in o.plan.timesteps]
    rows = np.sort(np.argsort(-count_GE.sum(1), kind="stable")[:MOST_CLASSES])
    share = count_GE[rows] / np.maximum(count_GE[rows].sum(1, keepdims=True), 1)
    height = 1.2 + 0.22 * max(6, len(rows))
    figure, ax = _heat(4.2, height, share, "share of tokens", cmap="viridis", vmin=0, aspect="auto")
    ax.set(ylabel=by, yticks=range(len(rows)), yticklabels=[names[row][:14] for row in rows])
    ax.set_title(title or f"block {o.blocks[layer]}")
    return _png(figure)


def explained(s: Summary) -> bytes:
    """How much of the choice of expert class, timestep and position explain, by layer."""
    figure, (ax,) = _figure(5, 2.9)
    place = np.arange(len(s.rows))
    for i, (key, name) in enumerate((("by_class", "class"), ("by_time", "timestep"), ("by_position", "position"))):
        ax.bar(place + 0.27 * (i - 1), [row[key] for row in s.rows], 0.25, label=name)
    chance = [row["class_chance"] for row in s.rows]
    ax.plot(place - 0.27, chance, "_", ms=14, mew=2, color="black", label="class by chance")
    ax.set(xlabel="block", ylabel="explained share of H(expert)", xticks=place)
    ax.set_xticklabels([str(block) for block in s.observed.blocks])
    ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _png(figure)


def maps(o: Observed, along: str) -> bytes:
    """A row per image: the image, then the expert of each of its tokens, by timestep (middle layer) or by layer."""
    if along == "timestep":
        map_MXS, heads = o.map_LMTS[o.middle], [f"t {t:g}" for t in o.plan.timesteps]
    else:
        layers = spread(len(o.blocks), MOST_LAYERS)
        map_MXS = o.map_LMTS[layers][:, :, o.plan.middle].swapaxes(0, 1)
        heads = [f"block {o.blocks[i]}" for i in layers]
    rows = [list(token_maps(map_XS, o.num_experts)) for map_XS in map_MXS]
    if o.pictures is not None:
        heads = ["image", *heads]
        rows = [[picture.squeeze(), *row] for picture, row in zip(o.pictures, rows, strict=True)]
    figure, axes = _figure(0.85 * len(heads), 0.85 * len(rows) + 0.3, len(rows), len(heads))
    for ax, tile in zip(axes, [tile for row in rows for tile in row], strict=True):
        ax.axis("off")
        ax.imshow(tile, cmap="gray", interpolation="nearest")
    for ax, head in zip(axes, heads, strict=False):  # the first row
        ax.set_title(head, fontsize=9)
    return _png(figure)


def scatter(s: Summary, by: str, title: str) -> bytes:
    """t-SNE of the middle layer's tokens, coloured by expert, cluster or class (Fig. 6, Fig. 1a)."""
    o = s.observed
    group_N = {"expert": o.expert_LN[o.middle], "cluster": s.cluster_N, "class": o.class_N}[by]
    number = {"expert": o.num_experts, "cluster": int(s.cluster_N.max()) + 1, "class": len(o.classes)}[by]
    palette = np.concatenate([expert_colours(number) / 255, [[0.8, 0.8, 0.8]]])  # -1, no expert: grey
    figure, (ax,) = _figure(4.2, 4.2)
    ax.scatter(*s.plane_N2.T, s=7, c=palette[group_N], linewidths=0)
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    if number <= 16:
        present = np.unique(group_N)
        names = [("none" if g < 0 else o.classes[g][:10] if by == "class" else str(g)) for g in present]
        dots = [ax.scatter([], [], s=30, color=palette[g], label=n) for g, n in zip(present, names, strict=True)]
        columns = 12 if max(map(len, names)) < 3 else 4
        ax.legend(
            handles=dots, ncols=columns, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0),
            handletextpad=0.1, columnspacing=0.7,
        )  # fmt: skip
    return _png(figure)


def matrix(values_EE: np.ndarray, title: str, low: float, high: float) -> bytes:
    """Experts against experts."""
    figure, ax = _heat(4.2, 3.6, values_EE, cmap="RdBu_r" if low < 0 else "viridis", vmin=low, vmax=high)
    ax.set(ylabel="expert", title=title)
    return _png(figure)


def diversity(summaries: Sequence[Summary]) -> bytes:
    """Similarity of experts' subspaces by layer (Fig. 1b): a line per run; dotted is chance."""
    figure, axes = _figure(5, 4.6, 2)
    for ax, key, title in zip(axes, ("similar_in", "similar_out"), ("read (in)", "written (out)"), strict=True):
        for i, s in enumerate(summaries):
            depth, colour = np.linspace(0, 1, len(s.rows)) if len(s.rows) > 1 else [0.5], f"C{i}"
            ax.plot(depth, [row[key] for row in s.rows], "o-", ms=4, color=colour, label=s.observed.name)
            ax.plot([0, 1], [s.rows[0]["chance"]] * 2, ":", lw=1, color=colour)
        ax.set(ylabel="mean similarity", title=f"subspaces {title}")
    axes[1].set_xlabel("depth: first to last MoE layer")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2)
    return _png(figure)
