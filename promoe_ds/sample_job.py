"""Filling a folder with samples: several processes, interruptions, one result.

Process r of W makes the images r, r + W, ... of a folder and writes each as a PNG as soon as its batch is finished.
A PNG is lossless and takes its name only when it is whole, so the PNGs *are* the record of what is done, and an
interrupted folder can be finished at another number of processes. `sampling.json` says what the folder holds; a folder
whose record differs is refused, never mixed.

Legend: N images, H W C pixels; r rank, W world size.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import promoe_ds
from promoe_ds.config import Config, reject
from promoe_ds.diffusion.objective import choose_sampler
from promoe_ds.sampling import How, Precision, class_labels, generate, grid, to_image
from promoe_ds.train.checkpoint import MANIFEST, manifest
from promoe_ds.workers import Worker, atomic

RECORD = "sampling.json"
OUTPUTS = re.compile(r"\d{6,}_class\d+\.png|samples\.npz|grid\.png|part-\d+-of-\d+\.npz")
LEFTOVERS = (".*.tmp", "part-*-of-*.npz")
DECISIVE = ("config", "checkpoint", "checkpoint_step", "checkpoint_blake2b", "cfg", "steps", "seed", "num", "precision",
            "sampler", "eta", "guidance_channels")  # fmt: skip
"""keys of the record that decide the images; a folder is continued only where all of them agree"""
IMPLIED = {"sampler": "euler", "eta": 0.0, "guidance_channels": "all"}
"""what records say that were written before these keys"""


# --------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True)
class Job:
    """All images of one guidance scale in one folder."""

    out: Path
    num: int
    """N, images over all processes"""
    cfg: float
    steps: int | str
    """of the sampler, as the objective takes them"""
    seed: int
    batch: int
    """images a forward (twice as many under guidance)"""
    precision: Precision
    how: How = How()

    def image_path(self, index: int, label: int) -> Path:
        return self.out / f"{index:06d}_class{label}.png"


def run_of(file: Path) -> Path | None:
    """The run folder of RUN/checkpoints/step_X/ema.safetensors; None for a file that lies elsewhere."""
    parents = file.resolve().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "checkpoints" else None


def provenance(file: Path, config: Config, step: int) -> dict[str, Any]:
    """The part of the record about the weights: path relative to the run, step, and the digest that names them.

    Raises:
        ConfigError: the digest is not the one in the checkpoint's manifest (if the file lies in a checkpoint).
    """
    run = run_of(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "blake2b").hexdigest()
    if file.with_name(MANIFEST).is_file():
        expected = manifest(file.parent)["files"].get(file.name, {}).get("blake2b", digest)
        if digest != expected:
            reject(
                "weights", file, "is damaged: it does not match its checksum", "name another checkpoint with --model"
            )
    relative = file.resolve().relative_to(run).as_posix() if run else file.name
    return {"config": config.name, "checkpoint": relative, "checkpoint_step": step, "checkpoint_blake2b": digest}


def record_of(job: Job, weights: Mapping[str, Any], command: str) -> dict[str, Any]:
    """What `sampling.json` says."""
    versions = {
        "promoe_ds": promoe_ds.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return {
        "command": command,
        **weights,
        "cfg": job.cfg,
        "steps": job.steps,
        "seed": job.seed,
        "num": job.num,
        "precision": job.precision,
        "sampler": job.how.sampler,
        "eta": job.how.eta,
        "guidance_channels": job.how.channels,
        "versions": versions,
    }


def check_folder(out: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder that holds other samples. Changes nothing; a missing folder is fine.

    Raises:
        ConfigError: the folder's record differs, is unreadable, or is missing beside files that would be overwritten.
    """
    if out.exists() and not out.is_dir():
        reject("--out", out, "is not a folder", "name another one")
    try:
        # Listed before the record is looked for: a process that started earlier writes its record first.
        foreign = sorted(p.name for p in out.iterdir() if OUTPUTS.fullmatch(p.name)) if out.exists() else []
        text = (out / RECORD).read_text(encoding="utf-8") if (out / RECORD).exists() else None
        found = {} if text is None else json.loads(text)
    except (OSError, ValueError) as error:
        reject("--out", out, f"its {RECORD} cannot be read ({error})", "name another folder or remove this one")
    if text is None:
        if foreign:
            reject("--out", out, f"holds {foreign[0]} but no {RECORD}", "name another folder")
        return
    for key in DECISIVE:
        old = found.get(key, IMPLIED.get(key)) if isinstance(found, dict) else None
        if old != record[key]:
            reject(
                "--out",
                out,
                f"holds samples of {key}={old}, this command has {key}={record[key]}",
                "name another folder or remove this one",
            )


def claim_folder(out: Path, record: Mapping[str, Any]) -> None:
    """Write the record into a folder that `check_folder` accepts; an existing record is kept.

    Every process does this, with equal content, so that none writes an image before the record is there.
    """
    check_folder(out, record)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / RECORD).exists():
            with atomic(out / RECORD) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        reject("--out", out, f"cannot be written ({error.strerror})", "name another folder")


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """uint8 [H, W, C] of a finished image; None if it is missing, damaged or of another shape, hence to be made."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    except (OSError, SyntaxError):  # Pillow reports some damaged PNGs as SyntaxError
        return None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def write_images(job: Job, indices: np.ndarray, labels: np.ndarray, images_NHWC: np.ndarray) -> None:
    """One PNG an image, each whole or absent."""
    for index, label, pixels in zip(indices.tolist(), labels.tolist(), images_NHWC, strict=True):
        with atomic(job.image_path(index, label)) as temporary:
            to_image(pixels).save(temporary, format="PNG")


def write_npz(path: Path, images_NHWC: np.ndarray, labels: np.ndarray) -> None:
    """The packed form of ADM's evaluation: `arr_0` uint8 [N, H, W, C], `arr_1` int64 [N]."""
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, arr_0=images_NHWC, arr_1=labels)


def _progress(job: Job, worker: Worker, total: int, done: int) -> tqdm:
    who = f" of process 1/{worker.world}" if worker.world > 1 else ""
    return tqdm(
        total=total,
        initial=done,
        desc=f"cfg {job.cfg}: images{who}",
        disable=worker.rank != 0,
        mininterval=0.5,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
        unit="image",
    )


def make_share(
    model: Callable[..., Any], config: Config, job: Job, worker: Worker, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Images r, r + W, ... of the job: those on disk are read, the others made and written batch by batch.

    Returns:
        uint8 [n, H, W, C] and their labels int64 [n].
    """
    m = config.model
    indices = np.arange(worker.rank, job.num, worker.world)
    labels = class_labels(job.num, m.num_classes)[indices]
    images = np.zeros((len(indices), m.image_size, m.image_size, m.channels), dtype=np.uint8)
    missing = []
    for row, (index, label) in enumerate(zip(indices.tolist(), labels.tolist(), strict=True)):
        pixels = read_image(job.image_path(index, label), images.shape[1:])
        if pixels is None:
            missing.append(row)
        else:
            images[row] = pixels
    rows = np.array(missing, dtype=np.int64)

    def keep(part: slice, made: np.ndarray) -> None:
        write_images(job, indices[rows[part]], labels[rows[part]], made)

    _, steps = choose_sampler(config, job.how.sampler, job.steps, job.how.eta)
    with _progress(job, worker, len(indices), len(indices) - len(rows)) as bar:
        images[rows] = generate(
            model,
            config,
            labels[rows],
            indices[rows],
            job.cfg,
            job.steps,
            job.seed,
            job.batch,
            device,
            job.precision,
            on_step=lambda count: bar.update(count / steps),
            on_batch=keep,
            how=job.how,
        )
    return images, labels


def assemble(job: Job, config: Config, worker: Worker, images: np.ndarray, labels: np.ndarray) -> None:
    """Rank 0, after the barrier: its share and the others' parts become `samples.npz` and `grid.png`."""
    if worker.world > 1:
        share, images = images, np.zeros((job.num, *images.shape[1:]), dtype=np.uint8)
        images[:: worker.world], labels = share, class_labels(job.num, config.model.num_classes)
        for rank in range(1, worker.world):
            with np.load(part_path(job, worker, rank), allow_pickle=False) as part:
                images[rank :: worker.world] = part["arr_0"]
    columns = min(10, config.model.num_classes, job.num)
    with atomic(job.out / "grid.png") as temporary:
        grid(images[: 10 * columns], columns).save(temporary, format="PNG")
    write_npz(job.out / "samples.npz", images, labels)
    for pattern in LEFTOVERS:
        for path in job.out.glob(pattern):
            path.unlink(missing_ok=True)


def part_path(job: Job, worker: Worker, rank: int) -> Path:
    return job.out / f"part-{rank}-of-{worker.world}.npz"


def run_job(
    model: Callable[..., Any],
    config: Config,
    job: Job,
    record: Mapping[str, Any],
    worker: Worker,
    device: torch.device,
    barrier: Callable[[], object],
) -> None:
    """Make or finish one folder: PNGs, `samples.npz`, `grid.png`, `sampling.json`.

    Raises:
        ConfigError: the folder holds other samples or cannot be written; the model makes values that are not finite.
    """
    claim_folder(job.out, record)
    images, labels = make_share(model, config, job, worker, device)
    if worker.rank > 0:
        write_npz(part_path(job, worker, worker.rank), images, labels)
    barrier()
    if worker.rank == 0:
        assemble(job, config, worker, images, labels)
