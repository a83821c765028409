"""Latents that other projects wrote, read as they are: a class per format, found by what lies at the path.

    CLASS/NAME.latent.npz, CLASS/NAME.JPEG.npz                     npz           ProMoE; MAR and DiffMoE
    latents_rank00_shard000.safetensors, latents_stats.pt          lightningdit  LightningDiT
    vae-sd/00000/img-mean-std-00000000.npy, vae-sd/dataset.json    repa          REPA
    00000/img-mean-std-00000000.npy, dataset.json, often in a zip  edm2          edm2
    imagenet256_features/0.npy, imagenet256_labels/0.npy           fast-dit      fast-DiT

Each holds one `Content`, and its `codec` has the scale and shift that its own project trains with. Where a format does
not name its codec, and the channels are not those of Stable Diffusion's, `data.scale` and `data.shift` are asked for.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import DataConfig
from promoe_ds.data import shards
from promoe_ds.data.caches.fast_dit import FastDiT
from promoe_ds.data.caches.lightningdit import LightningDiT
from promoe_ds.data.caches.mean_std import MeanStd
from promoe_ds.data.caches.npz_tree import LatentTree
from promoe_ds.data.labelled import LABELS
from promoe_ds.data.latents import Latents, LatentShards
from promoe_ds.data.zips import first_name
from promoe_ds.utils.files import hidden

MOST_BENEATH = 64
"""names of a folder up to which caches are looked for in it, to name them: not in the classes of ImageNet"""
FORMATS: dict[str, Any] = {
    "lightningdit": LightningDiT, "repa": MeanStd, "edm2": MeanStd, "fast-dit": FastDiT, "npz": LatentTree
}  # fmt: skip
LOOKED_FOR = (
    f"looked for {shards.INDEX} of launchers/encode_latents.py, CLASS/NAME.latent.npz (ProMoE) or CLASS/NAME.JPEG.npz "
    f"(MAR, DiffMoE), {LightningDiT.PATTERN} (LightningDiT), {LABELS} beside NNNNN/*.npy, in vae-sd/ or in a "
    ".zip (REPA, edm2), *_features/ beside *_labels/ (fast-DiT)"
)


def _kinds(place: Path) -> list[Any]:
    """The readers of what lies at a path, by its names."""
    if place.is_file():
        return [MeanStd] if MeanStd.finds(place) else []
    if any(any(place.glob(name)) for name in ("shard-*", shards.INDEX, "encoding.json")):
        return [LatentShards]
    return [kind for kind in (LightningDiT, MeanStd, FastDiT, LatentTree) if kind.finds(place)]


def _beneath(place: Path, found: list[Any]) -> list[str]:
    """Names of the caches in a folder that is `found` to be none, or a tree: a folder that holds a tree looks like one
    itself, so then there must be another kind among them."""
    if place.is_file() or len(inside := [p for p in place.iterdir() if not hidden(p.name)]) > MOST_BENEATH:
        return []
    kinds: dict[str, list[Any]] = {}
    for path in inside:
        with contextlib.suppress(OSError):  # what cannot be looked at is not named
            if path.is_dir() or first_name(path).endswith(".npy"):
                kinds[path.name] = _kinds(path)
    known = {name: kind for name, kind in kinds.items() if kind}
    return sorted(known) if any(kind != found for kind in known.values()) else []


def open_latents(path: str | Path, said: DataConfig | None = None, num_classes: int | None = None) -> Latents:
    """A folder of shards, or the cache of another project, whichever `path` is; `~` is expanded.

    Args:
        said: `format` names the reader; `scale` and `shift` are those of a cache that does not say.
        num_classes: of the model, for formats that store numbers and no names.

    Raises:
        ConfigError: none of these, two of them, or what the readers report.
    """
    said, place = said or DataConfig(), Path(path).expanduser()
    if not place.exists():
        way_out = "name the --out of launchers/encode_latents.py, or a cache of latents"
        reject("data.path", path, "does not exist", way_out)
    if not (place.is_file() or place.is_dir()):
        reject("data.path", path, "is neither a file nor a folder", "name what can be read at any place")
    found = _kinds(place)
    if said.format not in (None, "shards") and found == [LatentShards]:
        reject("data.format", said.format, f"{path} holds shards of launchers/encode_latents.py", "remove it")
    if said.format == "shards" or found == [LatentShards]:
        for key in ("scale", "shift"):
            if getattr(said, key) is not None:
                reject(f"data.{key}", getattr(said, key), f"{shards.INDEX} of {path} says its own", "remove it")
        return LatentShards(place)
    if said.format is not None:
        return FORMATS[said.format](place, said, num_classes)
    if found in ([], [LatentTree]) and (names := _beneath(place, found)):
        reject("data.path", path, f"is no cache of latents, but holds some: {', '.join(names)}", "name one of them")
    if len(found) > 1:
        names = " and ".join(kind.__name__ for kind in found)
        reject("data.path", path, f"holds what {names} read", "set data.format, or keep one of them there")
    if not found:
        reject("data.path", path, f"is no cache of latents: {LOOKED_FOR}", "name another path or set data.format")
    return found[0](place, said, num_classes)
