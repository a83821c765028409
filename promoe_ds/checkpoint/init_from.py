"""Starting a run from weights alone (`train.init`): imported, exported, or of another run. Step 0, new optimizer state.

What the weights compute must be what the run computes; how it is trained (losses, objective, data) may differ. Each
option says which it is: `config.schema.Change`. Beyond that, another `model.image_size` resizes the position table,
and the parts named in `train.init_reset` start anew:

    labels     the label table is drawn, as for a model without weights; the null label keeps its row
    experts    routers and routed experts are drawn; a dense block's MLP is split (`upcycle.py`)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.checkpoint.load_weights import checked_digest, find_weights, header, open_weights, shard_files
from promoe_ds.checkpoint.upcycle import DENSE, check_split, upcycled
from promoe_ds.config.errors import reject
from promoe_ds.config.option import differences
from promoe_ds.config.schema import Config
from promoe_ds.models.init import build, draw_labels
from promoe_ds.models.layers import grid_sinusoids
from promoe_ds.utils.outputs import CONFIG

KINDS = ("kept", "resized", "split", "drawn")
LABELS = "y_embedder.weight"
TABLE = "pos_embed"


@dataclass(frozen=True)
class Origin:
    """Where a parameter of the run comes from."""

    kind: str
    """one of `KINDS`"""
    make: Callable[[], Tensor | None]
    """the full tensor; None: as the model was drawn"""
    note: str = ""


def listed(config: Config) -> Config:
    """With the MoE layers as a list: what counts is which they are, not how they are written."""
    return config if config.moe is None else replace(config, moe=replace(config.moe, layers=config.moe_layers()))


def is_sine_cosine(table_1SD: Tensor) -> bool:
    """Whether it is the fixed table, also after it was stored in bf16."""
    side = round(table_1SD.shape[1] ** 0.5)
    fixed = grid_sinusoids(table_1SD.shape[2], side)
    return table_1SD.shape == fixed.shape and torch.allclose(table_1SD, fixed, rtol=0, atol=1e-2)


def resize(table_1SD: Tensor, side: int) -> Tensor:
    """A position table for side*side tokens: the fixed one anew, a learned one by antialiased bicubic interpolation.

    As timm 1.0 does (`resample_abs_pos_embed`). Returns float32 [1, side*side, D].
    """
    if is_sine_cosine(table_1SD):
        return grid_sinusoids(table_1SD.shape[2], side)
    before = round(table_1SD.shape[1] ** 0.5)
    table_1DHW = table_1SD.mT.unflatten(2, (before, before))
    made = torch.nn.functional.interpolate(table_1DHW, size=(side, side), mode="bicubic", antialias=True)
    return made.flatten(2).mT.contiguous()


class InitialWeights:
    """Random access to the tensors of `train.init`, with the interface of `resume.Reader`.

    Raises:
        ConfigError: nothing there; a model that computes something else (the key and both values); a tensor that is
            missing or that the model does not have, by name; a dense MLP that does not split into these experts.
    """

    def __init__(self, config: Config):
        assert config.train.init is not None
        self.file = find_weights(Path(config.train.init), "train.init")
        self.path = self.file.parent
        self.config, self.theirs = config, header(self.file)[0]
        self.where: dict[str, Any] = {}
        for part in shard_files(self.file):
            checked_digest(part, "train.init")
            opened = open_weights(part)
            self.where |= dict.fromkeys(opened.keys(), opened)
        self._check_options()
        self.used: set[str] = set()
        self.origins = {name: self._origin(name) for name in build(config).state_dict()}
        self._check_unused()

    def __call__(self, name: str, state: str) -> Tensor | None:
        """The full tensor, float32, or None where the model's own draw stays; `state` is ignored: there is one."""
        return self.origins[name].make()

    def _check_options(self) -> None:
        mine, theirs, reset = listed(self.config), listed(self.theirs), self.config.train.init_reset
        for path, before, now, way_out in differences(theirs, mine, ("finetune", "resume")):
            part = self._part_of(path)
            if part == "" or part in reset:
                continue
            conflict = f"the weights in train.init={self.path} have {path}={before}"
            way_out = f"{way_out}, or start from {self.path / CONFIG}"
            reject(path, now, conflict, f"{way_out}, or add train.init_reset=[{part}]" if part else way_out)

    def _part_of(self, path: str) -> str | None:
        """What must be in `train.init_reset` for this option to differ: a part, "" for nothing; None: it never may."""
        mine, theirs = self.config, self.theirs
        if path in ("model.image_size", "model.num_classes"):
            return "" if path == "model.image_size" else "labels"
        if mine.moe is None or not path.startswith("moe"):
            return None
        more_layers = path == "moe.layers" and set(mine.moe_layers()) > set(theirs.moe_layers())
        anew = theirs.moe is None or more_layers or path == "moe.num_experts" or path.startswith("moe.router")
        return "experts" if anew else None

    def _anew(self, name: str) -> Origin | None:
        """Of a tensor of a MoE layer that starts anew; None for all others."""
        match = re.match(r"blocks\.(\d+)\.mlp\.(.*)", name)
        if not match or "experts" not in self.config.train.init_reset:
            return None
        block, part = int(match[1]), match[2]
        if block not in self.config.moe_layers():
            return None
        if block in self.theirs.moe_layers() or part.startswith("router."):
            return Origin("drawn", lambda: None) if part.startswith(("router.", "routed.")) else None
        check_split(self.config)
        dense = {key: f"blocks.{block}.mlp.{key}" for key in DENSE}
        self._need(*dense.values())
        return Origin("split", lambda: upcycled({k: self._read(name) for k, name in dense.items()}, self.config, part))

    def _need(self, *names: str) -> None:
        for name in names:
            if name not in self.where:
                conflict = f"does not fit its own config: {name} is missing"
                reject("train.init", self.file, conflict, "name other weights")
        self.used |= set(names)

    def _origin(self, name: str) -> Origin:
        if made := self._anew(name):
            return made
        self._need(name)
        if name == LABELS and "labels" in self.config.train.init_reset:
            return Origin("drawn", self._labels, "the null label keeps its row")
        side, before = (c.model.image_size // c.model.patch for c in (self.config, self.theirs))
        if name == TABLE and side != before:
            how = "computed anew" if is_sine_cosine(self._read(name)) else "learned, so bicubic"
            note = f"{before}x{before} to {side}x{side} tokens, {how}"
            return Origin("resized", lambda: resize(self._read(name), side), note)
        return Origin("kept", partial(self._read, name))

    def _check_unused(self) -> None:
        """What the model has no place for must belong to a part that starts anew."""
        for name in self.where.keys() - self.used:
            anew = ".mlp.router." in name or ".mlp.routed." in name
            if not (anew and "experts" in self.config.train.init_reset):
                conflict = f"does not fit its own config: {name} is unexpected"
                reject("train.init", self.file, conflict, "name other weights")

    def _read(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name).float()

    def _labels(self) -> Tensor:
        """Drawn rows of the classes, and the row of the null label."""
        m = self.config.model
        table = draw_labels(torch.empty(m.num_classes + 1, m.width), self.config.train.seed)
        table[-1] = self._read(LABELS)[-1]
        return table

    def record(self) -> dict[str, Any]:
        """What a run folder says of its start: names of the run's tensors by what was done, and those left out."""
        by_kind = {kind: [name for name, o in self.origins.items() if o.kind == kind] for kind in KINDS}
        facts = {"init": str(self.path), "init_reset": list(self.config.train.init_reset)}
        return facts | by_kind | {"left_out": sorted(self.where.keys() - self.used)}

    def summary(self) -> str:
        """The same for people, a line for each kind."""
        lines = []
        for kind in KINDS:
            named = {name: o.note for name, o in self.origins.items() if o.kind == kind}
            if kind == "kept" or not named:
                lines += [f"kept {len(named)} of {len(self.origins)} tensors"] if kind == "kept" else []
                continue
            shown = [f"{name} ({note})" if note else name for name, note in named.items()][:3]
            more = f" and {len(named) - len(shown)} more" if len(named) > len(shown) else ""
            lines.append(f"{kind} {', '.join(shown)}{more}")
        return "".join(f"\ntrain.init: {line}" for line in lines)
