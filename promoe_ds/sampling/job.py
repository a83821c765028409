"""Filling a folder with samples: several processes, interruptions, one result.

Process r of W makes the images r, r + W, ... of a folder and writes a batch as soon as it is finished
(`store.py`); an interrupted folder can be finished at another number of processes and another batch size.
`sampling.json` says what the folder holds; a folder whose record differs is refused, never mixed.

Legend: N images, H W C pixels; r rank, W world size.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm import tqdm

from promoe_ds.checkpoint.load_weights import checked_digest
from promoe_ds.config.decode import dump
from promoe_ds.config.errors import reject, written
from promoe_ds.config.schema import Config
from promoe_ds.data.codecs import Codec
from promoe_ds.data.shards import check_codec
from promoe_ds.diffusion.objective import check_steps
from promoe_ds.sampling.generate import (
    Labels,
    SamplingOptions,
    class_labels,
    draw_batches,
    forwards_per_image,
    pixel_batches,
    pixel_shape,
)
from promoe_ds.sampling.store import BatchStore, PngStore, Store, read_all, whole, write_npz
from promoe_ds.utils.command_line import versions
from promoe_ds.utils.files import NOT_FOUND, making, parse_json, read_json, write_text
from promoe_ds.utils.outputs import CODEC, CONFIG, RECORD, SAMPLES, check_place
from promoe_ds.utils.pictures import grid, write_png
from promoe_ds.utils.ranks import ALONE, Ranks

FEATURES = "features.safetensors"
OUTPUTS = re.compile(r"\d{6,}_class\d+\.png|samples\.npz|grid\.png|features\.safetensors|made-\d+\.(npy|safetensors)")
LEFTOVERS = (".*.tmp", "made-*.npy", "made-*.safetensors")
INCIDENTAL = "command", "versions", "forwards_per_image"
"""keys of the record that do not decide the images; a folder is continued only where all others agree"""
ONCE = {"guidance_interval": [0.0, 1000.0], "pixels": "adm"}
"""what records that are older than a key mean by its absence; None for all others"""


@dataclass(frozen=True)
class Job:
    """All images of one guidance scale in one folder."""

    out: Path
    num: int
    """N, images over all processes"""
    options: SamplingOptions
    labels: Labels = "balanced"
    formats: tuple[str, ...] = ("png", "npz")
    """png: a file per image; npz: `samples.npz`; at least one of them; or features alone, and no pictures"""
    protocol: dict[str, Any] | None = None
    """whose way of drawing this is (`protocols.py`), for the record"""


def run_of(file: Path) -> Path | None:
    """The run folder of RUN/checkpoints/step_X/ema.safetensors; None for a file that lies elsewhere."""
    parents = file.resolve().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "checkpoints" else None


def codec_of_run(file: Path) -> dict[str, Any] | None:
    """The record of the codec whose latents the run was trained on; None for pixels or where it is not known."""
    run = run_of(file)
    try:
        if run is None:
            return None
        record = read_json(run / CODEC)
        check_codec(record)
        return record
    except NOT_FOUND:
        return None
    except (OSError, ValueError) as error:
        reject("--run", f"{run}", f"its {CODEC} cannot be read ({error})", "restore it or remove it")


def provenance(file: Path, config: Config, step: int, option: str = "weights") -> dict[str, Any]:
    """The part of the record about the weights: path relative to the run, step, and the digest that names them.

    Raises:
        ConfigError: the file cannot be read, or its digest is not the one in the manifest of its checkpoint.
    """
    run, digest = run_of(file), checked_digest(file, option)
    relative = file.resolve().relative_to(run).as_posix() if run else file.name
    return {"config": config.name, "checkpoint": relative, "checkpoint_step": step, "checkpoint_blake2b": digest}


@runtime_checkable
class Pack(Store, Protocol):
    """A store of features, such as `promoe_ds.evaluation.feature_store.FeatureStore`."""

    def pictures(self) -> list[np.ndarray]: ...
    def pack(self, labels_N: np.ndarray, sampling: Mapping[str, Any]) -> None: ...


def record_of(
    job: Job,
    weights: Mapping[str, Any],
    config: Config,
    command: str,
    codec: Codec | None = None,
    features: str | None = None,
    weak: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `sampling.json` says.

    Args:
        weights: where they come from, and `weak` of those that guide.
        features: name of the extractor, where only features are kept.
    """
    how = job.options
    options = asdict(how) | {
        "guidance_channels": how.channels,
        "guidance_interval": list(how.guided_when(config)),
        "guidance_model": dict(weak) if weak else None,
    }
    del options["batch"], options["channels"], options["interval"]
    return {
        "command": command,
        **weights,
        **options,
        "num": job.num,
        "labels": job.labels,
        "protocol": job.protocol,
        "forwards_per_image": forwards_per_image(config, how),
        "vae": f"{codec.kind} {codec.digest}".strip() if codec else None,
        "features": features,
        "versions": versions(),
    }


def check_folder(out: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder that holds other samples. Changes nothing; a missing folder is fine.

    Raises:
        ConfigError: the folder's record differs, is unreadable, or is missing beside files that would be overwritten;
            the folder lies among a run's checkpoints.
    """
    check_place(out)
    if out.exists() and not out.is_dir():
        reject("--out", out, "is not a folder", "name another one")
    try:
        # Listed before the record is looked for: a process that started earlier writes its record first.
        names = sorted(p.name for p in out.iterdir()) if out.exists() else []
        text = (out / RECORD).read_text(encoding="utf-8") if (out / RECORD).exists() else None
        found = {} if text is None else parse_json(text)
    except (OSError, ValueError) as error:
        reject("--out", out, f"its {RECORD} cannot be read ({error})", "name another folder or remove this one")
    if text is None:
        foreign = [name for name in names if name == CONFIG or OUTPUTS.fullmatch(name)]  # a run folder has a CONFIG
        if foreign:
            reject("--out", out, f"holds {foreign[0]} but no {RECORD}", "name another folder")
        return
    for key in [key for key in record if key not in INCIDENTAL]:
        old = found.get(key, ONCE.get(key)) if isinstance(found, dict) else None
        if old != record[key]:
            conflict = f"holds samples of {key}={written(old)}, this command has {key}={written(record[key])}"
            reject("--out", out, conflict, "name another folder or remove this one")


def claim_folder(out: Path, record: Mapping[str, Any], config: Config) -> None:
    """Write record and configuration into a folder that `check_folder` accepts; an existing record is kept.

    Every process does this, with equal content, so that none writes an image before the record is there.
    """
    check_folder(out, record)
    try:
        with making(out):
            if not (out / RECORD).exists():
                write_text(out / RECORD, json.dumps(record, indent=2) + "\n")
        if not (out / CONFIG).exists():
            write_text(out / CONFIG, dump(config))
    except OSError as error:
        reject("--out", out, f"cannot be written ({error.strerror})", "name another folder")


@dataclass(frozen=True)
class SampleWorker:
    """What makes images, on this process."""

    model: Callable[..., Any]
    config: Config
    device: torch.device
    ranks: Ranks = ALONE
    codec: Codec | None = None
    lockstep: bool = False
    """the processes hold one model together, so all of them must run equally many batches"""
    pack: Callable[[Path], Pack] | None = None
    """folder -> the store of jobs whose format is features"""
    weak: Callable[..., Any] | None = None
    """the model that guides in place of the null label"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return pixel_shape(self.config, self.codec)

    def labels(self, job: Job) -> np.ndarray:
        return class_labels(job.num, self.config.model.num_classes, job.labels, job.options.seed)


def _store(sampler: SampleWorker, job: Job) -> Store:
    if "features" in job.formats:
        assert sampler.pack is not None, "features need a store"
        return sampler.pack(job.out)
    if "png" in job.formats:
        return PngStore(job.out, sampler.labels(job), sampler.shape)
    return BatchStore(job.out, sampler.shape)


def make_share(sampler: SampleWorker, job: Job) -> None:
    """Images r, r + W, ... of the job: those on disk are kept, the others made and written batch by batch."""
    store, labels = _store(sampler, job), sampler.labels(job)
    indices = np.arange(sampler.ranks.rank, job.num, sampler.ranks.world)
    found = [pixels is not None for pixels in read_all(store, indices.tolist())]
    missing = indices[~np.array(found, dtype=bool)]
    ranks, options, rounds = sampler.ranks, job.options, -(-len(missing) // job.options.batch)
    if sampler.lockstep:
        rounds = max(ranks.gather(rounds))
    steps = check_steps(sampler.config.diffusion, options.solver(sampler.config), "--steps")
    with tqdm(
        total=len(indices),
        initial=len(indices) - len(missing),
        desc=f"cfg {options.cfg}: images{f' of process 1/{ranks.world}' if ranks.world > 1 else ''}",
        disable=ranks.rank != 0,
        mininterval=0.5,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
        unit="image",
    ) as bar:
        made = 0  # steps of an image

        def tick(count: int) -> None:
            nonlocal made
            made += count
            bar.n = len(indices) - len(missing) + made / steps  # a sum of fractions may end above the total
            bar.update(0)

        drawn = labels[missing], missing, options, sampler.device, tick, rounds, sampler.weak
        batches = draw_batches(sampler.model, sampler.config, *drawn)
        for rows, images in pixel_batches(batches, sampler.codec, options.pixels):
            store.write(missing[rows], images)


def assemble(sampler: SampleWorker, job: Job, record: Mapping[str, Any]) -> None:
    """Rank 0, after the barrier: what all processes have made becomes `grid.png` and the packed file, which is last."""
    store, labels = _store(sampler, job), sampler.labels(job)
    columns = min(10, sampler.config.model.num_classes, job.num)
    pack = store if isinstance(store, Pack) else None
    try:
        shown = pack.pictures() if pack else list(whole(store, min(job.num, 10 * columns)))
        write_png(job.out / "grid.png", grid(np.stack(shown[: 10 * columns]), columns))
        if pack:
            pack.pack(labels, record)
        elif "npz" in job.formats:
            write_npz(job.out / SAMPLES, whole(store, job.num), (job.num, *sampler.shape), labels)
    except LookupError as error:
        reject("--out", job.out, str(error), "run the same command again")
    except OSError as error:
        reject("--out", job.out, f"cannot be written ({error.strerror})", "free space, and run the same command again")
    store.clear()


def complete(job: Job) -> bool:
    """Whether a folder without PNGs is done: its packed file takes its name last. A zip that was cut is none."""
    if "features" in job.formats:
        return (job.out / FEATURES).exists()
    return "png" not in job.formats and zipfile.is_zipfile(job.out / SAMPLES)


def run_job(sampler: SampleWorker, job: Job, record: Mapping[str, Any]) -> None:
    """Make or finish one folder: PNGs, `samples.npz`, `grid.png`, `sampling.json`, `config.yaml`.

    Raises:
        ConfigError: the folder holds other samples or cannot be written; the model makes values that are not finite.
    """
    claim_folder(job.out, record, sampler.config)
    done = complete(job)
    if not done:
        make_share(sampler, job)
    sampler.ranks.barrier()  # also where all is done: nobody claims the next folder alone
    if sampler.ranks.rank == 0:
        if not done:
            assemble(sampler, job, record)
        for path in (path for pattern in LEFTOVERS for path in job.out.glob(pattern)):
            path.unlink(missing_ok=True)
