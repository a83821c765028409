"""The numbers of the report: one row for each MoE layer, their means for each run.

Legend: as in `collect`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from promoe_ds.analysis.collect import Observed
from promoe_ds.analysis.measures import (
    chance_entropy,
    distance_ratio,
    explained_entropy,
    kmeans_clusters,
    mean_of_pairs,
    subspace_similarity,
    tsne,
)
from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.moe.observe import cosines, dead_experts, load_entropy, max_over_mean, prototype_statistics

CLUSTERS = 10
"""of k-means, as in Fig. 1a"""

COLUMNS: dict[str, tuple[str, str]] = {
    "load_max": ("load max/mean", "busiest expert over the mean; 1 is even"),
    "load_entropy": ("load entropy", "of the shares of the experts, over ln E; 1 is even"),
    "dead": ("dead", "experts that took no token"),
    "nobody": ("no expert", "share of tokens that no expert took"),
    "gate": ("gate", "mean gate weight of an edge"),
    "by_class": ("class", "share of the choice of expert that the class of the image explains, I/H; 0 to 1"),
    "by_time": ("timestep", "the same for the timestep"),
    "kept": ("same expert", "share of tokens with an expert, always the same, at all timesteps shown; near 1 is stuck"),
    "by_position": ("position", "the same for the token's place in the image"),
    "class_chance": ("class by chance", "what the class explains with the classes of the images shuffled"),
    "ratio_expert": ("inter/intra expert", "distance between experts' tokens over their spread; high is specialised"),
    "ratio_kmeans": ("inter/intra k-means", f"the same for {CLUSTERS} k-means clusters (Fig. 1a)"),
    "ratio_class": ("inter/intra class", "the same for the classes of the images"),
    "similar_in": ("similarity, in", "of the subspaces that two experts read (first matrix); low is diverse (Fig. 1b)"),
    "similar_out": ("similarity, out", "of the subspaces that two experts write (second matrix)"),
    "chance": ("by chance", "similarity of two random subspaces, k / D"),
    "prototype_cos": ("prototype cos", "mean cosine of two prototypes"),
    "prototype_cos_max": ("largest", "largest cosine of two prototypes"),
}
"""key -> (head of the column, what it means)"""


@dataclass
class Summary:
    """An observed model and what was computed from it."""

    observed: Observed
    rows: list[dict[str, float]]
    """a row per layer: `block`, and those of `COLUMNS` that exist"""
    similar_in: list[np.ndarray]
    similar_out: list[np.ndarray]
    """[E, E] per layer"""
    prototype_cos: list[np.ndarray]
    cluster_N: np.ndarray
    """k-means clusters of the middle layer's tokens"""
    plane_N2: np.ndarray
    """their t-SNE"""

    def means(self) -> dict[str, float]:
        """The mean over the layers of every column, without those that are not defined."""
        keys = [key for key in COLUMNS if key in self.rows[0]]
        values = {key: [row[key] for row in self.rows if math.isfinite(row[key])] for key in keys}
        return {key: float(np.mean(found)) for key, found in values.items() if found}


def check_rank(config: Config, rank: int | None) -> None:
    """Raises `ConfigError` if an expert's matrices have no `rank` singular vectors."""
    if rank is None or config.moe is None:
        return
    most = min(config.model.width, int(config.moe.hidden_ratio * config.model.width))
    if not 1 <= rank <= most:
        reject("--subspace", rank, f"an expert's matrices have {most} singular vectors", "choose 1 to that many")


def summarise(observed: Observed, rank: int | None = None) -> Summary:
    """Everything the report shows, from one model's choices; k-means and t-SNE take seconds per layer.

    Args:
        rank: k of the subspaces; by default an eighth of the width, so that chance is 1/8.
    """
    o, seed, width = observed, observed.plan.seed, observed.config.model.width
    rank = rank or max(1, width // 8)
    clusters = [kmeans_clusters(x_ND, CLUSTERS, seed) for x_ND in o.token_LND]
    similar_in = [subspace_similarity(w1.transpose(0, 2, 1), rank) for w1, _ in o.experts]
    similar_out = [subspace_similarity(w2, rank) for _, w2 in o.experts]
    p_LED = [torch.from_numpy(p_ED) for p_ED in o.prototype_LED]
    prototypes = [cosines(p_ED).numpy() for p_ED in p_LED]
    rows = []
    for layer, block in enumerate(o.blocks):
        row = {"block": float(block)} | (_use(o, layer) if o.num_experts else {})
        row["ratio_kmeans"] = distance_ratio(o.token_LND[layer], clusters[layer])
        row["ratio_class"] = distance_ratio(o.token_LND[layer], o.class_N)
        if o.num_experts:
            row["similar_in"] = mean_of_pairs(similar_in[layer])
            row["similar_out"] = mean_of_pairs(similar_out[layer])
            row["chance"] = rank / width
        if prototypes and o.num_experts > 1:
            *_, row["prototype_cos"], row["prototype_cos_max"] = prototype_statistics(p_LED[layer]).tolist()
        rows.append(row)
    plane_N2 = tsne(o.token_LND[o.middle], seed)
    return Summary(o, rows, similar_in, similar_out, prototypes, clusters[o.middle], plane_N2)


def _use(o: Observed, layer: int) -> dict[str, float]:
    count_TCE = o.count_LTCE[layer]
    load_E = count_TCE.sum((0, 1))
    load_1E, taken_N = torch.from_numpy(load_E)[None], o.expert_LN[layer] >= 0
    tokens = len(o.plan.timesteps) * o.config.model.tokens * o.images
    return {
        "load_max": float(max_over_mean(load_1E)),
        "load_entropy": float(load_entropy(load_1E)),
        "dead": float(dead_experts(load_1E)),
        "nobody": o.nobody_L[layer] / tokens,
        "gate": o.weight_L[layer] / max(1, load_E.sum()),
        "by_class": explained_entropy(count_TCE.sum(0)),
        "class_chance": chance_entropy(o.count_LIE[layer], o.label_I, o.plan.seed),
        "by_time": explained_entropy(count_TCE.sum(1)),
        "kept": float(o.kept_LIS[layer].mean()),
        "by_position": explained_entropy(o.count_LSE[layer]),
        "ratio_expert": distance_ratio(o.token_LND[layer][taken_N], o.expert_LN[layer][taken_N]),
    }


def number(value: float) -> str:
    """Three digits; a dash where it is not defined."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the comparison: a row per run, the means over its layers."""
    means = [summary.means() for summary in summaries]
    keys = [key for key in COLUMNS if any(key in mean for mean in means)]
    heads = ["run", "step", *(COLUMNS[key][0] for key in keys)]
    return heads, [
        [s.observed.name, str(s.observed.step), *(number(mean.get(key, math.nan)) for key in keys)]
        for s, mean in zip(summaries, means, strict=True)
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys; numbers as Python writes them, so nothing is lost."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def csv_files(s: Summary) -> dict[str, str]:
    """File name -> text."""
    o = s.observed
    points = zip(s.plane_N2, o.expert_LN[o.middle], s.cluster_N, o.class_N, strict=True)
    tokens = [{"x": p[0], "y": p[1], "expert": e, "cluster": k, "class": o.classes[c]} for p, e, k, c in points]
    files = {"layers.csv": to_csv(s.rows), "tokens.csv": to_csv(tokens)}
    if not o.num_experts:
        return files
    experts = [f"expert_{e}" for e in range(o.num_experts)]

    def counts(group: str, names: Sequence[Any], count_LGE: Sequence[np.ndarray] | np.ndarray) -> str:
        return to_csv([
            {"block": block, group: name} | dict(zip(experts, count_E.tolist(), strict=True))
            for block, count_GE in zip(o.blocks, count_LGE, strict=True)
            for name, count_E in zip(names, count_GE, strict=True)
        ])  # fmt: skip

    files["use_by_class.csv"] = counts("class", o.classes, o.count_LTCE.sum(1))
    files["use_by_timestep.csv"] = counts("timestep", o.plan.timesteps, o.count_LTCE.sum(2))
    files["use_by_position.csv"] = counts("position", range(o.config.model.tokens), o.count_LSE)
    matrices = {"similarity_in": s.similar_in, "similarity_out": s.similar_out, "prototypes": s.prototype_cos}
    return files | {f"{k}.csv": counts("expert", range(o.num_experts), v) for k, v in matrices.items() if v}
