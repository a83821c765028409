"""Resuming: whether a run folder may be continued, and its checkpoint read into an engine of any topology."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.layout import AVERAGE, RESUMED_STATES, StateAccess, candidates, manifest, step_of, unreadable
from promoe_ds.checkpoint.load_weights import open_weights
from promoe_ds.config.decode import BAD_YAML, read_yaml
from promoe_ds.config.errors import ConfigError, reject
from promoe_ds.config.option import Difference, differences
from promoe_ds.config.schedule import end_of, same_rates
from promoe_ds.config.schema import Config
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.files import NOT_FOUND, parse_json
from promoe_ds.utils.outputs import CONFIG, SAVED


def check_same_run(saved: dict[str, Any], config: Config, where: Path) -> None:
    """Raise ConfigError if an option differs between a saved configuration and `config` that no resume may change."""
    try:
        known = load_tree(saved)
    except ConfigError as error:
        reject("--run", where, f"holds a configuration that this version cannot read ({error})", "choose another --run")
    for path, old, new, way_out in differences(known, config, free=("resume",)):
        reject(path, new, f"{where} was made with {path}={old}", f"{way_out} or choose another --run")


def check_run(run: Path, config: Config) -> None:
    """`check_same_run` of RUN/config.yaml, if there is one, which somebody may have edited since the checkpoints.

    Raises ConfigError, also if the folder is no run's, but one of weights, which has a config.yaml, too.
    """
    saved = saved_config(run)
    if saved is None:
        return
    if (run / "manifest.json").exists():  # those of a run lie in its checkpoints
        way_out = f"name another folder; train.init={run} starts from them"
        reject("--run", run, "holds weights that were exported or imported", way_out)
    for path, old, new, _ in _edits(saved, run):
        conflict = f"{run / CONFIG} was edited or damaged, its checkpoints were made with {path}={old}"
        reject(path, new, conflict, "put the old file back, or its old value, or start a new run with another --run")
    check_same_run(saved, config, run)


def _edits(saved: dict[str, Any], run: Path) -> Iterator[Difference]:
    """Of RUN/config.yaml from the newest checkpoint, in options that no resume may change."""
    with contextlib.suppress(ConfigError, IndexError, KeyError):  # damage is told by who reads it, none is none
        made = load_tree(manifest(candidates(run)[-1])["config"])
        yield from differences(made, load_tree(saved), free=("resume",))


def changed_rates(found: Path | None, config: Config) -> list[str]:
    """The options that give the steps to come other rates than the run before had, as "KEY VALUE instead of VALUE".

    Those to come are all up to the end of the schedule, for the run may be made longer; none, if it has ended.

    Raises:
        ConfigError: there is no step left to make with another `optimizer.lr`; or the run has another length, and its
            schedule would have had other rates from the start.
    """
    if found is None:
        return []
    saved, done = load_tree(manifest(found)["config"]), step_of(found)
    _check_length(saved, config, done)
    lr, steps = saved.optimizer.lr, config.train.steps
    if done >= steps:
        if lr != config.optimizer.lr:
            conflict = f"{found} is at the last step, and was made with optimizer.lr={lr}"
            reject("optimizer.lr", config.optimizer.lr, conflict, f"raise train.steps, or set optimizer.lr={lr}")
        return []
    last = max(steps, end_of(saved), end_of(config)) + 1

    def felt(undone: list[Difference]) -> bool:
        before = _with(config, **{key: value for change in undone for key, value in _before(change, saved, config)})
        return not same_rates(before, config, done + 1, last)

    changes = list(differences(saved, config, free=("never", "finetune")))
    of_rates = [change for change in changes if change.path == "train.steps" or change.path.startswith("optimizer.")]
    told = [change for change in of_rates if felt([change])]
    if not told and felt(of_rates):  # one hides the other
        told = of_rates
    told += [change for change in changes if change.path == "moe.router.bias_rate"]
    return [f"{change.path} {change.new} instead of {change.old}" for change in told]


def _before(change: Difference, saved: Config, config: Config) -> Iterator[tuple[str, Any]]:
    """The options of the optimizer, with their values, that would undo a change. A schedule without a length of its own
    has that of the run."""
    key = change.path.rpartition(".")[2]
    if change.path == "train.steps":
        yield "schedule_steps", config.optimizer.schedule_steps or end_of(saved)
    else:
        yield key, end_of(saved) if key == "schedule_steps" else getattr(saved.optimizer, key)


def _with(config: Config, **changed: Any) -> Config:
    return replace(config, optimizer=replace(config.optimizer, **changed))


def _check_length(saved: Config, config: Config, done: int) -> None:
    """Another length must not change, without a word, what the steps before should have been made with."""
    steps, end, o = config.train.steps, end_of(saved), config.optimizer
    if steps == saved.train.steps or o.schedule_steps or o.schedule != saved.optimizer.schedule:
        return
    longer = _with(saved, schedule_steps=steps)
    if not (same_rates(saved, longer, 1, done) or same_rates(saved, config, 1, done)):
        conflict = f"the {done} steps before were made for a {o.schedule} schedule of {end} steps"
        way_out = f"set optimizer.schedule_steps={end} to keep it, or {steps} to change it from here on"
        reject("train.steps", steps, conflict, way_out)


def check_same_data(found: Path, data: str) -> None:
    """Raise ConfigError if a checkpoint was trained on other images than `data`, a `promoe_ds.data.fingerprint`."""
    saved = manifest(found).get("data", data)
    if saved != data:
        reject("data.path", data, f"{found} was trained on {saved}", "bring that data back or choose another --run")


class Reader:
    """Random access to the full tensors of a checkpoint's state files."""

    def __init__(self, path: Path):
        self.path = path
        self.where: dict[str, Any] = {}
        self.averages: list[str] = []
        """states that are EMAs"""
        for name in sorted(manifest(path)["files"]):
            file, average = open_weights(path / name), AVERAGE.fullmatch(name)
            self.averages += [average[1]] if average else []
            prefix = f"{average[1]}/" if average else ""
            self.where |= {prefix + key: (file, key) for key in file.keys()}

    def __call__(self, name: str, state: str) -> Tensor:
        """The full fp32 tensor of a parameter's state; raises ConfigError if the checkpoint lacks it."""
        key = f"{state}/{name}" if state in self.averages else f"{name}/{state}"
        if key not in self.where:
            reject("checkpoint", self.path, f"holds no {key}", "use a checkpoint of this model")
        file, inner = self.where[key]
        return file.get_tensor(inner)


def load_weights(reader: Reader | InitialWeights, model: nn.Module, local: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Copy weights into a model before the engine is made: the master weights of what is trained, and of the EMA file
    what is not (the position table, buffers). What `train.init_reset` starts anew stays as it was drawn.

    Args:
        local: (parameter, full tensor) -> this rank's part of it.

    Raises:
        ConfigError: one is missing or has another shape.
    """
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            full = reader(name, "fp32" if p.requires_grad else "ema")
            if full is None:
                continue
            part = local(p, full)
            if part.shape != p.shape:
                conflict = f"{name} has shape {list(part.shape)}, the model {list(p.shape)}"
                reject("checkpoint", reader.path, conflict, "use a checkpoint of this model")
            p.copy_(part)


def restore(reader: Reader, engine: StateAccess, step: int, quiet: bool = True) -> None:
    """Fill the engine's master weights, moments and EMAs as after `step` updates."""
    engine.allocate(step)
    for name in tqdm(engine.params, desc="restoring", unit="tensor", disable=quiet or None, delay=1):
        for state in (*RESUMED_STATES, *reader.averages):
            engine.write(name, state, reader(name, state))


def saved_config(run: Path) -> dict[str, Any] | None:
    """The plain configuration tree in RUN/config.yaml, or None; raises ConfigError if it cannot be read."""
    path = run / CONFIG
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except NOT_FOUND:
        return None
    except (OSError, *BAD_YAML) as error:
        reject("--run", path, f"cannot be read ({' '.join(str(error).split())})", "fix it or choose another --run")
    if not isinstance(tree, dict):
        reject("--run", path, "is not a configuration", "fix it or choose another --run")
    return tree


def logged(run: Path) -> list[tuple[int, str]]:
    """(step, line) of the whole records in RUN/metrics.jsonl, if there is one; raises ConfigError if it is unreadable.

    The last line may be cut: it was being written when the run was killed.
    """
    path, out = run / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except NOT_FOUND:
        return []
    except OSError as error:
        unreadable(path, error, "--run")
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            out.append((int(parse_json(line)["step"]), line))
    return out


def check_history(run: Path, found: Path | None, config: Config) -> int:
    """The step to continue from, 0 for a fresh run.

    Raises:
        ConfigError: the run is past `train.steps`, or it had checkpoints and they are gone.
    """
    if found:
        step = step_of(found)
        if step > config.train.steps:
            reject("train.steps", config.train.steps, f"{run} is at step {step} already", "raise it")
        return step
    if (run / SAVED).exists():
        way_out = "bring them back, or remove the folder to start again"
        reject("--run", run, "had checkpoints, and checkpoints/ is empty", way_out)
    return 0
