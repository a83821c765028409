"""The folder of an analysis: `report.html`, a PNG per figure, CSVs with every number."""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from promoe_ds.analysis import figures as draw
from promoe_ds.analysis import page
from promoe_ds.analysis.collect import Observed
from promoe_ds.analysis.summary import COLUMNS, Summary, csv_files, number, table, to_csv
from promoe_ds.checkpoint.resume import logged
from promoe_ds.config.errors import reject
from promoe_ds.costs import flops
from promoe_ds.utils.files import atomic, making, parse_json, read_json, write_text
from promoe_ds.utils.outputs import SAMPLES, check_place

REPORT = "report.html"
FILES = "files.json"
"""names of what the report consists of, so that the next one removes them and nothing else"""
SCORES = ("cfg", "num", "label_agreement", "FID", "FD", "sFID", "sFD", "KID", "KD", "IS", "precision", "recall",
          "density", "coverage", "fd_over_noise")  # fmt: skip
"""what is shown of scores; a name in brackets may follow"""
MOST_SCORED = 20
"""scores while training, in the table; metrics.jsonl has all"""


def check_folder(out: Path) -> None:
    """An earlier analysis may be replaced, anything else not. Raises `ConfigError`."""
    check_place(out)
    if out.exists() and not out.is_dir():
        reject("--out", out, "is not a folder", "name another one")
    whole = all((out / name).exists() for name in (REPORT, FILES))
    if out.exists() and any(out.iterdir()) and not (whole or _listed(out)):
        reject("--out", out, f"holds files but no {FILES} of a report", "name an empty or a new folder")


def prepare_folder(out: Path) -> None:
    """Make it, and try to write there: better now than after the work. Raises `ConfigError`."""
    try:
        with making(out):
            tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        reject("--out", out, f"cannot be written ({error.strerror})", "name another folder")


class Writer:
    """Collects figures and files; a figure is written as a PNG of its own and put into the page."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def figure(self, name: str, png: bytes, caption: str, wide: bool = False) -> str:
        self.files[f"{name}.png"] = png
        return page.figure(png, caption, wide)

    def write(self, out: Path) -> None:
        """Files first, the page last: with it the folder is whole; those of an earlier report go.

        The list of files is written before them and again after, so that an interrupted report can be cleared up.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            old, new = _listed(out), list(self.files)
            write_text(out / FILES, json.dumps(sorted({*old, *new})))
            for name, data in self.files.items():
                with atomic(out / name) as temporary:
                    temporary.write_bytes(data)
            for path in (out / name for name in set(old) - set(new)):
                if path.is_file():
                    path.unlink()
            write_text(out / FILES, json.dumps(sorted(new)))
        except OSError as error:
            reject("--out", out, f"cannot be written ({error.strerror})", "name another folder")


def _listed(out: Path) -> list[str]:
    """Files of an earlier report, of this folder alone; none where the list is damaged, or is no report's.

    Every report lists its page: a folder of the user's may hold a `files.json` too.
    """
    try:
        names = read_json(out / FILES)
    except (OSError, ValueError):
        return []
    if not isinstance(names, list) or REPORT not in names:
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


@mpl.rc_context(draw.STYLE)
def write_report(out: Path, summaries: Sequence[Summary], run: Path | None, command: str) -> None:
    """Write the folder, which `check_folder` and `prepare_folder` have seen.

    Args:
        summaries: of the model that the report is about, then of those it is compared with.
        run: its run folder, whose samples, scores and log are shown.
        command: the command line, shown in the report.

    Raises:
        ConfigError: the folder cannot be written.
    """
    writer, (first, *others) = Writer(), summaries
    sections = _training(writer, run) if run else []
    if first.observed.num_experts:
        sections += [("Numbers", page.text("By MoE layer; `layers.csv` has all digits.") + _layer_table(first))]
        sections += [("Who uses which expert", _use(writer, first)), ("Token maps", _maps(writer, first.observed))]
    sections.append(("Tokens", _tokens(writer, first)))
    if first.observed.num_experts:
        sections.append(("Diversity", _diversity(writer, first)))
    slug = slugs([s.observed.name for s in summaries])
    if others:
        sections.append(("Comparison", _comparison(writer, summaries, slug)))
    for s in summaries:
        prefix = "" if s is first else f"{slug[s.observed.name]}."
        writer.files |= {f"{prefix}{name}": text.encode() for name, text in csv_files(s).items()}
    document = page.page(f"Experts of {first.observed.name}", _head(first, command, run is not None), sections)
    writer.files[REPORT] = document.encode()
    writer.write(out)


def slugs(names: Sequence[str]) -> dict[str, str]:
    """Name of a run -> how its files begin; no two begin alike."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name)
        tries = (plain if i == 1 else f"{plain}_{i}" for i in itertools.count(1))
        found[name] = next(text for text in tries if text not in found.values())
    return found


def _head(s: Summary, command: str, of_run: bool) -> str:
    o, moe = s.observed, s.observed.config.moe
    sizes = flops.count_parameters(o.config)
    size = f"{sizes.total / 1e6:.1f} M parameters ({sizes.activated / 1e6:.1f} M activated)"
    if moe is None:
        kind = "A dense model: there are no experts to see. Its tokens are shown below, at the middle block."
    else:
        extras = f"{moe.num_shared} shared, {moe.num_unconditional if moe.conditional else 0} unconditional"
        layers = f"{len(o.blocks)} MoE layers (blocks {', '.join(map(str, o.blocks))})"
        kind = f"Router `{moe.router.name}`, {moe.num_experts} routed experts ({extras}) in {layers}."
    times = ", ".join(f"{t:g}" for t in o.plan.timesteps)
    source = o.config.data.path or o.config.data.name
    seen = f"Seen: {o.images} images of `{source}`, each at timesteps {times} of 1000 (1000 is noise),"
    return page.text(
        f"{o.config.name}: step {o.step}, {size}.",
        kind,
        f"{seen} with its own label, without guidance.{' EMA weights.' if of_run else ''}",
        f"`{command}`",
    )


def _training(writer: Writer, run: Path) -> list[tuple[str, str]]:
    """Samples, scores and curves, of which there may be none."""
    parts, records = [], [parse_json(line) for _, line in logged(run)]
    if len(losses := [record for record in records if "loss" in record]) > 1:
        parts.append(writer.figure("training", draw.training(losses), "Loss and busiest expert while training"))
    if len(watched := [record for record in losses if "router_grad_norm" in record.get("layers", {})]) > 1:
        caption = "Mean gradient of each router while training; far below the others, a layer has stopped learning"
        parts.append(writer.figure("router_gradients", draw.router_gradients(watched), caption))
    samples = {"experts.png": ", and the expert of each token in the last step (middle layer)", "grid.png": ""}
    if name := next((name for name in samples if (run / "samples" / name).is_file()), None):
        caption = f"EMA samples, one row per class{samples[name]}"
        parts.append(writer.figure("samples", (run / "samples" / name).read_bytes(), caption, wide=True))
    scores = _scores(run, [record["scores"] for record in records if isinstance(record.get("scores"), dict)])
    shown = page.figures(*parts) + (page.table(*scores) if scores else "")
    return [("Training", shown)] if parts or scores else []


def recorded_scores(run: Path) -> list[dict[str, Any]]:
    """The sets of RUN/metrics.json, none if there is none. Raises `ConfigError` where it holds something else."""
    path = run / "metrics.json"
    if not path.is_file():
        return []
    try:
        sets = read_json(path)["sets"]
        if not (isinstance(sets, list) and all(isinstance(s["samples"], str) for s in sets)):
            raise TypeError("its sets are none of samples")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reject("--run", path, f"holds no scores ({error!r})", "score the samples again, or remove it")
    return sets


def _scores(run: Path, trained: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """A row per set of samples, those of metrics.jsonl before those of RUN/metrics.json; None if there are none."""

    def short(samples: str) -> str:  # runs/digits/samples/cfg1.0/samples.npz is cfg1.0
        path = Path(samples)
        return path.parent.name if path.name == SAMPLES else path.name

    sets = [trained[i] for i in draw.spread(len(trained), MOST_SCORED)] if trained else []
    sets += recorded_scores(run)
    found = dict.fromkeys(key for s in sets for key, value in s.items() if value is not None)
    keys = [key for key in found if key.split("[")[0] in SCORES]
    known = [{key: s[key] if isinstance(s.get(key), int | float) else math.nan for key in keys} for s in sets]
    rows = [[short(s["samples"]), *map(number, row.values())] for s, row in zip(sets, known, strict=True)]
    return (["samples", *(key.replace("_", " ") for key in keys)], rows) if sets else None


def _layer_table(s: Summary) -> str:
    """A row per number, a column per layer, and what the number means."""
    keys = [key for key in COLUMNS if key in s.rows[0]]
    rows = [[COLUMNS[k][0], *(number(row.get(k, math.nan)) for row in s.rows), COLUMNS[k][1]] for k in keys]
    return page.table(["", *(f"block {int(row['block'])}" for row in s.rows), "meaning"], rows, words=True)


def _use(writer: Writer, s: Summary) -> str:
    o = s.observed
    explained = "What explains the choice of expert: 0 nothing, 1 decides it; black: shuffled classes"
    shown = page.figures(
        writer.figure("load", draw.load(o), "Load of each expert, over all timesteps: 1 is even, 0 is dead"),
        writer.figure("explained", draw.explained(s), explained),
    )
    for by in ("class", "timestep"):
        cut = by == "class" and len(o.classes) > draw.MOST_CLASSES
        more = f" (the {draw.MOST_CLASSES} most frequent)" if cut else ""
        parts = []
        for i in draw.spread(len(o.blocks), draw.MOST_LAYERS):
            caption = f"Expert use by {by}{more}, block {o.blocks[i]}"
            parts.append(writer.figure(f"use_by_{by}_block{o.blocks[i]}", draw.use(o, i, by), caption))
        shown += page.figures(*parts)
    return shown


def _maps(writer: Writer, o: Observed) -> str:
    note = "A square is a token (a patch of the image), a colour an expert of that layer; white: no expert took it."
    captions = {"timestep": f"Expert of each token by timestep, block {o.blocks[o.middle]}"}
    time = f"{o.plan.timesteps[o.plan.middle]:g}"
    if len(o.blocks) > 1:
        captions["layer"] = f"Expert of each token by layer, timestep {time}"
    parts = [writer.figure(f"maps_by_{along}", draw.maps(o, along), text) for along, text in captions.items()]
    return page.text(note) + page.figures(*parts)


def _tokens(writer: Writer, s: Summary) -> str:
    o = s.observed
    time = f"{o.plan.timesteps[o.plan.middle]:g}"
    place = f"{len(o.class_N)} tokens of block {o.blocks[o.middle]} at timestep {time}, t-SNE"
    kinds = {"expert": "expert"} if o.num_experts else {}
    kinds |= {"cluster": "k-means cluster", "class": "class of the image"}
    parts = [
        writer.figure(f"tsne_by_{by}", draw.scatter(s, by, f"by {name}"), f"Coloured by {name}: {place}")
        for by, name in kinds.items()
    ]
    note = (
        "Tokens as the router sees them (Fig. 6 of the paper), or as they enter a dense block. Where experts are "
        "specialised, the colours of the first figure form islands. Distances of t-SNE mean little; the ratios "
        "inter/intra are taken in the full space."
    )
    return page.text(note) + page.figures(*parts) + ("" if o.num_experts else _layer_table(s))


def _diversity(writer: Writer, s: Summary) -> str:
    o, parts = s.observed, []
    block = o.blocks[o.middle]
    shown = page.text(
        "Subspace similarity (Hu et al. 2021, Sec. 7.2): of the top-k singular vectors of two experts' matrices, on "
        "the side of the tokens: right ones of the first matrix, what an expert reads; left ones of the second, what "
        "it writes. The hidden units of each expert have an order of their own and are not compared."
    )
    if o.num_experts > 1:
        picture = draw.matrix(s.similar_out[o.middle], f"similarity, out, block {block}", 0, 1)
        parts += [
            writer.figure("diversity", draw.diversity([s]), "Similarity of experts by layer (Fig. 1b); dotted: chance"),
            writer.figure("similarity_out", picture, f"Subspaces that the experts of block {block} write"),
        ]
    if s.prototype_cos:
        picture = draw.matrix(s.prototype_cos[o.middle], f"cosine of prototypes, block {block}", -1, 1)
        parts.append(writer.figure("prototypes", picture, f"Prototypes (or centroids) of block {block}"))
    elif o.config.moe:
        shown += page.text(f"The router `{o.config.moe.router.name}` has no prototypes.")
    return shown + page.figures(*parts)


def _comparison(writer: Writer, summaries: Sequence[Summary], slug: dict[str, str]) -> str:
    keys, parts = [key for key in COLUMNS if any(key in s.rows[0] for s in summaries)], []
    means = [s.means() for s in summaries]
    rows = [
        {"run": s.observed.name} | {key: m.get(key, "") for key in keys} for s, m in zip(summaries, means, strict=True)
    ]
    writer.files["comparison.csv"] = to_csv(rows).encode()
    if sparse := [s for s in summaries if s.observed.num_experts]:
        text = "Similarity of experts by depth; dotted: chance"
        parts.append(writer.figure("compare_diversity", draw.diversity(sparse), text))
    for s in sparse:
        o, name = s.observed, slug[s.observed.name]
        parts += [
            writer.figure(f"{name}.tsne", draw.scatter(s, "expert", o.name), f"{o.name}: tokens by expert"),
            writer.figure(f"{name}.use", draw.use(o, o.middle, "class", o.name), f"{o.name}: experts by class"),
        ]
    note = "Means over the MoE layers; what the columns mean stands under Numbers. `comparison.csv` has all digits."
    return page.text(note) + page.table(*table(summaries)) + page.figures(*parts)
