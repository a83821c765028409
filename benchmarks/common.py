"""What the benchmark programs share: result pages, points that are kept, lists on the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from promoe_ds.config.errors import reject
from promoe_ds.utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent


def device_name(world: int = 1) -> str:
    """The GPUs, or the CPU cores and threads of this process; of the first node, if `world` ranks need several."""
    per_node = int(os.environ.get("TASKS_PER_NODE") or world)  # slurm/common.sh exports it
    nodes = -(-world // per_node) if "SLURM_JOB_ID" in os.environ else 1
    first = f"{nodes} nodes, the first: " if nodes > 1 else ""
    if torch.cuda.is_available():
        return f"{first}{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{first}{cores} virtual {platform.machine()} CPU cores, {threads} thread(s), shared machine"


def facts(world: int = 1) -> dict[str, str]:
    """Commit (with a + if the tree differs from it), versions, and the device of `world` ranks."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed_version()}"
    return {"commit": commit(), "versions": versions, "device": device_name(world)}


def commit() -> str:
    """ "unknown" without git, or in a copy without its history."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def deepspeed_version() -> str:
    """Without importing it, which is slow and may fail."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def page(
    title: str, program: str, words: Sequence[str], *parts: str, measured: Sequence[dict[str, str]] | None = None
) -> str:
    """A result page in markdown: title, command and facts, then `parts`, a blank line between them.

    Args:
        program: path in this repository.
        words: its command line.
        measured: `facts` kept with each measurement; those of this process if not given.
    """
    rows = {"command": f"`{shlex.join(['python', program, *words])}`"}
    kept = [facts()] if measured is None else measured
    for name in kept[0] if kept else ():
        rows[name] = "; ".join(dict.fromkeys(each[name] for each in kept))
    return "\n\n".join([f"# {title}", table(["", ""], rows.items()), *parts]) + "\n"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Median (lowest to highest)."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@contextmanager
def figure(path: Path, widths: list[float]) -> Iterator[Any]:
    """Axes side by side, of these relative widths; each gets a legend, and the picture is written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, len(widths), figsize=(4.3 * sum(widths), 3.6), width_ratios=widths, squeeze=False)
    yield axes[0]
    for axis in axes[0]:
        axis.legend(fontsize=7)
    drawn.tight_layout()
    drawn.savefig(path, dpi=80)
    pyplot.close(drawn)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def ema_difference(run: Path, other: Path, step: int) -> float:
    """The largest difference of an EMA weight between checkpoints of two runs; infinite if the names differ."""
    from promoe_ds.checkpoint import layout  # needs tqdm, the rest does not

    x, y = (load_file(layout.folder(each, step) / layout.EMA) for each in (run, other))
    return max(float((x[name] - y[name]).abs().max()) for name in x) if x.keys() == y.keys() else math.inf


def save_point(folder: Path, name: str, point: dict[str, Any]) -> None:
    """Keep a measured point in a file of its own: the tasks of an array job share the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(point, indent=1) + "\n")


def load_points(folder: Path, option: str = "--out") -> dict[str, dict[str, Any]]:
    """Every point in a folder by name, oldest first. Raises ConfigError for a damaged file."""
    points = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            points[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            reject(option, path, f"is damaged ({error})", "remove the file, and its point is measured again")
    return points


def integers(text: str, least: int = 1) -> list[int]:
    """`1,2,4` on the command line."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of {least} or more")
    return [int(word) for word in words]


def words_of(*known: str) -> Callable[[str], list[str]]:
    """Type of an option that takes a comma-separated list of known words."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return found

    return parse
