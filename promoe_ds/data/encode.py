"""Images to shards of latents: several processes, interruptions, one result.

A shard is a fixed range of the sorted items, so its bytes do not depend on the number of processes. Process r of W
makes the shards r, r + W, ... and each takes its name only when it is whole and on disk; `progress/NNNNN.json` then
says so, with its checksum. Processes need not talk to each other: whoever finishes last finds all shards done and
writes the index. `encoding.json` says what the folder is for; another job in the same folder is refused.

Legend: n items of a shard, F flips, M channels of moments, h w latent cells; r rank, W world size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from promoe_ds.config.errors import ConfigError, reject, written
from promoe_ds.data import shards
from promoe_ds.data.codecs import Codec
from promoe_ds.data.images import DecodedImages
from promoe_ds.data.latents import Latents
from promoe_ds.utils.files import file_digest, making, read_json, write_text
from promoe_ds.utils.ranks import Ranks

RECORD, PROGRESS = "encoding.json", "progress"
AHEAD = 2
"""batches loaded ahead of the codec"""


def renamed(error: ConfigError, option: str) -> str:
    """An error about a data set, in the words of a launcher that names it otherwise."""
    text = str(error).replace("data.path=", f"{option}=", 1).replace("data.split=", "--split=", 1)
    for key in ("format", "scale", "shift"):
        text = re.sub(rf"^data\.{key}=", f"--{key}=", text)  # what is wrong; what to do is written as it is typed
        text = text.replace(f"data.{key}=", f"--{key} ").replace(f"data.{key}", f"--{key}")
    return text


class Source(ABC):
    """What is turned into shards: items in a fixed order.

    Args:
        data: names the items and their classes, and loads them.
        codec: the record of what makes the moments.
        shape: (F, M, h, w) of an item: F is 2 where there is a mirror image, else 1.
        image_size: H, in pixels.
    """

    option: str
    """of the launcher, which names the path of the data"""
    crop: str
    batch = 32

    def __init__(self, data: DecodedImages | Latents, codec: dict[str, Any], shape: tuple[int, ...], image_size: int):
        self.data, self.codec, self.shape, self.image_size = data, codec, shape, image_size
        self.classes, self.label_N, self.left_out = data.classes, data.label_B, data.left_out

    @abstractmethod
    def compute(self, loaded: list[np.ndarray]) -> Iterable[np.ndarray]:
        """What `data.load` gave of some items to float32 [F, M, h, w] of each."""

    def where(self, item: int) -> str:
        """Option and path, for messages."""
        return f"{self.option}={self.data.where(item)}"

    def read(self, items: range) -> Iterator[np.ndarray | str]:
        """float32 [F, M, h, w] of each item in turn, or what is wrong with it. Loading runs ahead, on threads."""
        waiting: deque[Iterator[np.ndarray | str]] = deque()
        with ThreadPoolExecutor(thread_name_prefix="load") as pool:
            for start in range(0, len(items), self.batch):
                waiting.append(pool.map(self._tried, items[start : start + self.batch]))
                if len(waiting) > AHEAD:
                    yield from self._computed(list(waiting.popleft()))
            while waiting:
                yield from self._computed(list(waiting.popleft()))

    def _tried(self, item: int) -> np.ndarray | str:
        try:
            return self.data.load(item)
        except ConfigError as error:  # the other items are looked at all the same
            return renamed(error, self.option)

    def _computed(self, batch: list[np.ndarray | str]) -> Iterator[np.ndarray | str]:
        whole = [loaded for loaded in batch if not isinstance(loaded, str)]
        moments = iter(self.compute(whole) if whole else ())
        return (loaded if isinstance(loaded, str) else next(moments) for loaded in batch)


class EncodedImages(Source):
    """Image files through a codec: each image and its mirror image."""

    option, crop = "--images", "ADM: box halvings, bicubic to the shorter side, central square"

    def __init__(self, images: DecodedImages, codec: Codec, batch: int, device: torch.device, precision: str = "fp32"):
        if images.image_size % codec.factor:
            conflict = f"is not divisible by the {codec.factor} pixels of a latent cell of {codec.kind}"
            reject("--size", images.image_size, conflict, "choose another size")
        cells = images.image_size // codec.factor
        super().__init__(images, codec.record(), (2, codec.moments, cells, cells), images.image_size)
        self.batch = batch
        self._codec, self._device, self._bf16 = codec, device, precision == "bf16"

    @torch.inference_mode()
    def compute(self, loaded: list[np.ndarray]) -> Iterable[np.ndarray]:
        pixels_BHWC = torch.from_numpy(np.stack(loaded)).to(self._device)
        both = [self._codec.encode_pixels(x_BHWC, self._bf16) for x_BHWC in (pixels_BHWC, pixels_BHWC.flip(2))]
        return torch.stack(both, dim=1).cpu().numpy()


class ConvertedLatents(Source):
    """Latents that somebody else encoded, as they are; std becomes a log-variance, and a scale is taken off."""

    option, crop = "--from-latents", "as in the tree"

    def __init__(self, data: Latents):
        shape = data.flips, data.parts * data.channels, data.image_size, data.image_size
        super().__init__(data, data.codec, shape, data.image_size * data.codec["factor"])

    def compute(self, loaded: list[np.ndarray]) -> Iterable[np.ndarray]:
        return loaded


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
        self.names = [source.data.name(item) for item in range(len(source.label_N))]
        items = range(len(self.names))
        self.shards = [items[first : first + job.shard_size] for first in items[:: job.shard_size]]
        """the items of each"""
        facts = {
            "format": shards.FORMAT,
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
                reject(self.source.option, repr(text), "the name is not UTF-8, or holds a newline", "rename it")
            state.update(text.encode() + b"\n")
        return state.hexdigest()

    def _claim(self, facts: dict[str, Any], about: dict[str, Any]) -> None:
        """Write the record, or refuse a folder that holds something else; every process does this alike."""
        out, path = self.job.out, self.job.out / RECORD
        try:
            with making(out):
                # Listed before the record is looked for: a process that started earlier writes its record first.
                foreign = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
                if path.exists():
                    record = read_json(path)
                    for key, value in facts.items():
                        if (old := record.get(key)) != value:
                            conflict = f"holds latents of {key}={written(old)}, this command has {key}={written(value)}"
                            reject("--out", out, conflict, "name another folder or remove this one")
                elif foreign:
                    reject("--out", out, f"holds {foreign[0]} but no {RECORD}", "name another folder")
                else:
                    write_text(path, json.dumps({**about, **facts}, indent=1) + "\n")
                (out / PROGRESS).mkdir(exist_ok=True)
        except (OSError, ValueError, AttributeError) as error:
            reject("--out", out, f"cannot be used ({' '.join(str(error).split())})", "name another folder")

    def _note(self, shard: int) -> Path:
        return self.job.out / PROGRESS / f"{shard:05d}.json"

    def done(self, shard: int) -> tuple[shards.Shard, dict[int, str]] | None:
        """What is known of a finished shard, and of its items that were left out; None if it is still to be made."""
        try:
            note = read_json(self._note(shard))
            made = shards.Shard(**note["shard"])
            skipped = {int(item): str(reason) for item, reason in note["skipped"].items()}
            whole = (self.job.out / made.file).stat().st_size == made.bytes
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return (made, skipped) if whole else None

    def make(self, shard: int, tick: Callable[[int], object]) -> int:
        """Make one shard; returns how many of its items are damaged, which are told to the user.

        With any, and no `skip_damaged`, nothing is written, but the others have been looked at.

        Raises:
            ConfigError: the moments do not fit their type.
        """
        items, skipped, kept = self.shards[shard], {}, 0
        moments = np.empty((len(items), *self.source.shape), dtype=shards.DTYPES[self.job.dtype])
        for item, value in zip(items, self.source.read(items), strict=True):
            tick(1)
            if not isinstance(value, str) and not np.isfinite(value).all():
                value = f"{self.source.where(item)}: its latent is not finite; replace the file"
            if isinstance(value, str):
                skipped[item] = value
                tqdm.write(f"damaged: {value}", sys.stderr)
                continue
            with np.errstate(over="ignore"):  # what is too large for float16 is said below
                moments[kept] = value
            if not np.isfinite(moments[kept]).all():
                conflict = f"the latent of {self.names[item]} is not finite in {self.job.dtype}"
                reject("--dtype", self.job.dtype, conflict, "use --dtype float32 and --precision fp32")
            kept += 1
        if skipped and not self.job.skip_damaged:
            return len(skipped)
        file = self.job.out / shards.shard_name(shard, len(self.shards))
        shards.write_tensors(file, {"moments": moments[:kept]})
        entry = shards.Shard(file.name, kept, file.stat().st_size, file_digest(file))
        note = {"shard": asdict(entry), "skipped": {str(item): reason for item, reason in skipped.items()}}
        write_text(self._note(shard), json.dumps(note) + "\n")
        return 0

    def finish(self) -> shards.Index | None:
        """Write the index, unless it is there; None if some shards are not done (another process is at them)."""
        notes = [note for shard in range(len(self.shards)) if (note := self.done(shard))]
        if len(notes) < len(self.shards):
            return None
        made = [shard for shard, _ in notes]
        with contextlib.suppress(ConfigError, OSError):
            index = shards.read_index(self.job.out, "--out")
            if index.shards == made and file_digest(self.job.out / shards.ITEMS) == index.items_blake2b:
                return index
        reasons = {item: reason for _, skipped in notes for item, reason in skipped.items()}
        kept = [item for item in range(len(self.names)) if item not in reasons]
        if not kept:
            reject("--out", self.job.out, "every image is damaged", "replace them and start again in another folder")
        names = np.frombuffer("\n".join(self.names[item] for item in kept).encode(), np.uint8)
        shards.write_tensors(self.job.out / shards.ITEMS, {"label": self.source.label_N[kept], "names": names})
        index = shards.Index(
            classes=self.source.classes,
            items=len(kept),
            shape=[*self.source.shape],
            dtype=self.job.dtype,
            image_size=self.source.image_size,
            crop=self.source.crop,
            codec=self.source.codec,
            items_blake2b=file_digest(self.job.out / shards.ITEMS),
            shards=made,
            skipped=[{"name": self.names[item], "reason": reasons[item]} for item in sorted(reasons)],
        )
        shards.write_index(self.job.out, index)
        for leftover in [*self.job.out.glob(".shard-*.tmp"), *(self.job.out / PROGRESS).glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)  # of processes that were killed
        return index


def run_encoding(encoder: Encoder, ranks: Ranks) -> shards.Index | None:
    """Make this process's shards; the index where it is the last, else None.

    Raises:
        ConfigError: an image is damaged (after all the others are done), or the folder cannot be written.
    """
    mine, damaged = range(ranks.rank, len(encoder.shards), ranks.world), 0
    todo = [shard for shard in mine if encoder.done(shard) is None]
    total, left = (sum(len(encoder.shards[shard]) for shard in part) for part in (mine, todo))
    bar = tqdm(total=total, initial=total - left, unit="image", mininterval=0.5,
               desc=f"latents of process 1/{ranks.world}" if ranks.world > 1 else "latents", smoothing=0.05,
               disable=ranks.rank != 0)  # fmt: skip
    try:
        with bar:
            for shard in todo:
                damaged += encoder.make(shard, bar.update)
        if damaged:
            conflict = f"{damaged} damaged image(s), named above; their shards are not written, all others are"
            reject("--out", encoder.job.out, conflict, "replace them and run again, or add --skip-damaged")
        return encoder.finish()
    except OSError as error:
        reject("--out", encoder.job.out, f"cannot be written ({error.strerror or error})", "make room and run again")
