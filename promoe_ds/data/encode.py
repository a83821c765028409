"""Images to shards of latents: several processes, interruptions, one result.

A shard is a fixed range of the sorted items, so its bytes do not depend on the number of processes. Process r of W
makes the shards r, r + W, ... and each takes its name only when it is whole and on disk; `progress/NNNNN.json` then
says so, with its checksum. Processes need not talk to each other: whoever finishes last finds all shards done and
writes the index. `encoding.json` says what the folder is for; another job in the same folder is refused.

Legend: n items of a shard, M channels of moments, h w latent cells; r rank, W world size.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from promoe_ds.config.schema import ConfigError, reject
from promoe_ds.data.codecs import Codec
from promoe_ds.data.images import DecodedImages
from promoe_ds.data.latents import LatentTree
from promoe_ds.data.shards import (
    DTYPES,
    FORMAT,
    ITEMS,
    Index,
    Shard,
    read_index,
    shard_name,
    write_index,
    write_tensors,
)
from promoe_ds.utils.files import file_digest, write_text
from promoe_ds.utils.ranks import Worker

RECORD, PROGRESS = "encoding.json", "progress"
AHEAD = 2
"""batches decoded ahead of the codec"""
CROP = "ADM: box halvings, bicubic to the shorter side, central square"


class Source(Protocol):
    """What is turned into shards: items in a fixed order."""

    classes: list[str]
    label_N: np.ndarray
    codec: dict[str, Any]
    shape: tuple[int, int, int]
    """[M, h, w]"""
    image_size: int
    crop: str

    def name(self, item: int) -> str: ...

    def where(self, item: int) -> str:
        """Option and path, for messages."""
        ...

    def read(self, items: range) -> Iterator[np.ndarray | str]:
        """float32 [2, M, h, w] of each item in turn, or what is wrong with it."""
        ...


def renamed(error: ConfigError, option: str) -> str:
    """An error about a data set, in the words of a launcher that calls it otherwise."""
    return str(error).replace("data.path=", f"{option}=", 1).replace("data.split=", "--split=", 1)


class _Items:
    """What both sources share: items of a data set, by the name of the option that they come from."""

    def __init__(self, option: str, data: DecodedImages | LatentTree, load: Callable[[int], np.ndarray]):
        self.classes, self.label_N, self.left_out = data.classes, data.label_B, data.left_out
        self._option, self._data, self._load = option, data, load

    def where(self, item: int) -> str:
        return f"{self._option}={self._data.where(item)}"

    def _loaded(self, item: int) -> np.ndarray | str:
        try:
            return self._load(item)
        except ConfigError as error:
            return renamed(error, self._option)


class EncodedImages(_Items):
    """Image files through a codec: each image and its mirror image. Decoding runs ahead of the codec, on threads."""

    def __init__(self, images: DecodedImages, codec: Codec, batch: int, device: torch.device, precision: str = "fp32"):
        if images.image_size % codec.factor:
            conflict = f"is not divisible by the {codec.factor} pixels of a latent cell of {codec.kind}"
            reject("--size", images.image_size, conflict, "choose another size")
        cells = images.image_size // codec.factor
        super().__init__("--images", images, images.pixels)
        self.shape, self.image_size, self.crop = (codec.moments, cells, cells), images.image_size, CROP
        self.name, self.codec = images.name, codec.record()
        self._codec, self._batch, self._device, self._bf16 = codec, batch, device, precision == "bf16"

    def _decoded(self, items: range) -> Iterator[list[np.ndarray | str]]:
        waiting: deque[list[Future]] = deque()
        with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
            for start in range(0, len(items), self._batch):
                waiting.append([pool.submit(self._loaded, item) for item in items[start : start + self._batch]])
                if len(waiting) > AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            for futures in waiting:
                yield [future.result() for future in futures]

    @torch.inference_mode()
    def _encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to moments float32 [B, 2, M, h, w]."""
        x_BCHW = torch.from_numpy(pixels_BHWC).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            both = [self._codec.encode(x.contiguous()) for x in (x_BCHW, x_BCHW.flip(-1))]
        return torch.stack(both, dim=1).float().cpu().numpy()

    def read(self, items: range) -> Iterator[np.ndarray | str]:
        for batch in self._decoded(items):
            whole = [pixels for pixels in batch if not isinstance(pixels, str)]
            moments = iter(self._encode(np.stack(whole)) if whole else ())
            for pixels in batch:
                yield pixels if isinstance(pixels, str) else next(moments)


class ConvertedTree(_Items):
    """An official tree of `.latent.npz` files, as it is."""

    def __init__(self, tree: LatentTree):
        super().__init__("--from-latents", tree, tree.both)
        self.name, self.codec, self.shape = tree.names.__getitem__, tree.codec, tree.shape
        self.image_size, self.crop = tree.shape[1] * tree.codec["factor"], "as in the tree"

    def read(self, items: range) -> Iterator[np.ndarray | str]:
        with ThreadPoolExecutor(thread_name_prefix="read") as pool:
            yield from pool.map(self._loaded, items)


# --------------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True)
class EncodeJob:
    """One folder of shards."""

    out: Path
    shard_size: int = 1024
    """items of every shard but the last"""
    dtype: str = "float16"
    precision: str = "fp32"
    skip_damaged: bool = False
    """leave damaged items out and list them in the index, instead of stopping at the end"""


class Encoder:
    """A source, a job, and what is done of it on disk."""

    def __init__(self, source: Source, job: EncodeJob, command: str, versions: dict[str, str]):
        self.source, self.job = source, job
        self.names = [source.name(item) for item in range(len(source.label_N))]
        self.count = -(-len(self.names) // job.shard_size)
        facts = {
            "format": FORMAT,
            "items": len(self.names),
            "items_blake2b": self._items_digest(),
            "classes": len(source.classes),
            "codec": source.codec,
            "image_size": source.image_size,
            "crop": source.crop,
            "dtype": job.dtype,
            "precision": job.precision,
            "shard_size": job.shard_size,
        }
        self._claim(facts, {"command": command, "versions": versions})

    def _items_digest(self) -> str:
        state = hashlib.blake2b(self.source.label_N.astype("<i8").tobytes(), digest_size=16)
        for text in (*self.source.classes, *self.names):
            if "\n" in text or text.encode(errors="ignore").decode() != text:
                reject("--images", repr(text), "the name is not UTF-8, or holds a newline", "rename it")
            state.update(text.encode() + b"\n")
        return state.hexdigest()

    def _claim(self, facts: dict[str, Any], about: dict[str, Any]) -> None:
        """Write the record, or refuse a folder that holds something else; every process does this alike."""
        out, path = self.job.out, self.job.out / RECORD
        try:
            out.mkdir(parents=True, exist_ok=True)
            # Listed before the record is looked for: a process that started earlier writes its record first.
            foreign = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
            if path.exists():
                self._compare(json.loads(path.read_text(encoding="utf-8")), facts)
            elif foreign:
                reject("--out", out, f"holds {foreign[0]} but no {RECORD}", "name another folder")
            else:
                write_text(path, json.dumps({**about, **facts}, indent=1) + "\n")
            (out / PROGRESS).mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            reject("--out", out, f"cannot be used ({' '.join(str(error).split())})", "name another folder")

    def _compare(self, found: Any, facts: dict[str, Any]) -> None:
        for key, value in facts.items():
            old = found.get(key) if isinstance(found, dict) else None
            if old != value:
                conflict = f"holds latents of {key}={old}, this command has {key}={value}"
                reject("--out", self.job.out, conflict, "name another folder or remove this one")

    def items(self, shard: int) -> range:
        size = self.job.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.names)))

    def _note(self, shard: int) -> Path:
        return self.job.out / PROGRESS / f"{shard:05d}.json"

    def done(self, shard: int) -> dict[str, Any] | None:
        """What is known of a finished shard: `Shard` and `skipped`; None if it is still to be made."""
        try:
            note = json.loads(self._note(shard).read_text(encoding="utf-8"))
            whole = (self.job.out / note["shard"]["file"]).stat().st_size == note["shard"]["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return note if whole else None

    def make(self, shard: int, tick: Callable[[int], object], complain: Callable[[str], object]) -> int:
        """Make one shard; returns how many of its items are damaged. With any, and no `skip_damaged`, nothing is
        written, but the others have been looked at. Raises `ConfigError` if the moments do not fit their type."""
        items, skipped = self.items(shard), {}
        moments = np.empty((len(items), 2, *self.source.shape), dtype=DTYPES[self.job.dtype])
        kept = 0
        for item, value in zip(items, self.source.read(items), strict=True):
            if not isinstance(value, str) and not np.isfinite(value).all():
                value = f"{self.source.where(item)}: its latent is not finite; replace the file"
            if isinstance(value, str):
                skipped[item] = value
                complain(value)
            else:
                with np.errstate(over="ignore"):  # what is too large for float16 is said below
                    moments[kept] = value
                if not np.isfinite(moments[kept]).all():
                    conflict = f"the latent of {self.names[item]} is not finite in {self.job.dtype}"
                    reject("--dtype", self.job.dtype, conflict, "use --dtype float32 and --precision fp32")
                kept += 1
            tick(1)
        if skipped and not self.job.skip_damaged:
            return len(skipped)
        file = self.job.out / shard_name(shard, self.count)
        write_tensors(file, {"moments": moments[:kept]})
        entry = Shard(file.name, kept, file.stat().st_size, file_digest(file))
        note = {"shard": asdict(entry), "skipped": {str(item): reason for item, reason in skipped.items()}}
        write_text(self._note(shard), json.dumps(note) + "\n")
        return 0

    def finished(self) -> Index | None:
        """The index of a folder that lacks nothing; None also where index or items are damaged: `finish` mends them."""
        if not all(self.done(shard) for shard in range(self.count)):
            return None
        try:
            index = read_index(self.job.out, "--out")
            return index if file_digest(self.job.out / ITEMS) == index.items_blake2b else None
        except (ConfigError, OSError):
            return None

    def finish(self) -> Index | None:
        """Write the index if every shard is done; None if some are not (another process is at them)."""
        notes = [self.done(shard) for shard in range(self.count)]
        if any(note is None for note in notes):
            return None
        reasons = {int(item): reason for note in notes if note for item, reason in note["skipped"].items()}
        kept = np.array([item for item in range(len(self.names)) if item not in reasons], dtype=np.int64)
        if not len(kept):
            reject("--out", self.job.out, "every image is damaged", "mend them and start again in another folder")
        names = "\n".join(self.names[item] for item in kept).encode()
        tensors = {"label": self.source.label_N[kept].astype(np.int64), "names": np.frombuffer(names, np.uint8)}
        write_tensors(self.job.out / ITEMS, tensors)
        index = Index(
            classes=self.source.classes,
            items=len(kept),
            shape=[2, *self.source.shape],
            dtype=self.job.dtype,
            image_size=self.source.image_size,
            crop=self.source.crop,
            codec=self.source.codec,
            items_blake2b=file_digest(self.job.out / ITEMS),
            shards=[Shard(**note["shard"]) for note in notes if note],
            skipped=[{"name": self.names[item], "reason": reasons[item]} for item in sorted(reasons)],
        )
        write_index(self.job.out, index)
        for leftover in [*self.job.out.glob(".shard-*.tmp"), *(self.job.out / PROGRESS).glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)  # of processes that were killed
        return index


def _progress(encoder: Encoder, mine: Sequence[int], worker: Worker) -> tqdm:
    total = sum(len(encoder.items(shard)) for shard in mine)
    done = sum(len(encoder.items(shard)) for shard in mine if encoder.done(shard))
    who = f" of process 1/{worker.world}" if worker.world > 1 else ""
    return tqdm(total=total, initial=done, desc=f"latents{who}", unit="image", disable=worker.rank != 0,
                mininterval=0.5, smoothing=0.05)  # fmt: skip


def run_encoding(encoder: Encoder, worker: Worker) -> Index | None:
    """Make this process's shards; the index where it is the last, else None.

    Raises:
        ConfigError: an image is damaged (after all the others are done), or the folder cannot be written.
    """
    finished = encoder.finished()
    if finished is not None:
        return finished
    mine, damaged = range(worker.rank, encoder.count, worker.world), 0
    try:
        with _progress(encoder, mine, worker) as bar:
            for shard in mine:
                if encoder.done(shard) is None:
                    damaged += encoder.make(shard, bar.update, _complain)
        if damaged:
            conflict = f"{damaged} damaged image(s), named above; their shards are not written, all others are"
            reject("--out", encoder.job.out, conflict, "mend them and run again, or add --skip-damaged")
        return encoder.finish()
    except OSError as error:
        reject("--out", encoder.job.out, f"cannot be written ({error.strerror or error})", "make room and run again")


def _complain(text: str) -> None:
    tqdm.write(f"damaged: {text}", sys.stderr)
