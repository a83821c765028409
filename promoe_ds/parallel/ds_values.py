"""What is inside a ds_config: DeepSpeed's own classes know the keys and read the values, before anything is built."""

from __future__ import annotations

import contextlib
import copy
import json
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import BaseModel, ValidationError

from promoe_ds.config.errors import did_you_mean, reject


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys a JSON may use -> the keys below them, to any depth."""
    out = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        out[field.alias or name] = _keys(inner[0]) if inner else {}
    return out


PASSED: dict[str, Any] = {
    "zero_optimization": _keys(DeepSpeedZeroConfig),
    "comms_logger": _keys(CommsLoggerConfig),
    "flops_profiler": dict.fromkeys(vars(DeepSpeedFlopsProfilerConfig({})), {}),
    "timers": {"throughput": _keys(DeepSpeedThroughputTimerConfig)},
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "log_level"), {}),
}
"""Keys handed to DeepSpeed as they are -> the keys below them. It ignores unknown ones at the top, below `timers`,
below `flops_profiler`, and wherever their value is "auto"."""


def unknown(where: str, value: Any, key: str, known: Iterable[str]) -> NoReturn:
    """Reject the key at `where`; names the nearest of the known ones."""
    conflict = "unknown key, which DeepSpeed would ignore or stumble over"
    reject(where, json.dumps(value), conflict, did_you_mean(key, known, "remove it"))


def check_keys(prefix: str, tree: dict[str, Any], known: dict[str, Any]) -> None:
    """Raises ConfigError for a key that DeepSpeed does not know, at any depth, or a section that is none."""
    for key, value in tree.items():
        if key not in known:
            unknown(f"{prefix}{key}", value, key, known)
        if isinstance(value, dict):
            check_keys(f"{prefix}{key}.", value, known[key])
        elif known[key] and not (value in (None, "auto") and known is not PASSED):
            way_out = f'write {{"{next(iter(known[key]))}": ...}}'
            reject(f"{prefix}{key}", json.dumps(value), "expected an object", way_out)


@contextlib.contextmanager
def _read(file: str, tree: dict[str, Any]) -> Iterator[None]:
    """DeepSpeed's complaints about values of `tree` as ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        section = [name for name, part in tree.items() if isinstance(part, dict) and keys and keys[0] in part][:1]
        value = json.dumps(first["input"], default=str)
        reject(f"{file}: {'.'.join([*section, *keys])}", value, first["msg"], "change the value")
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        reject("--ds_config", file, f"DeepSpeed cannot use it: {text[:300]}", "change the value")


def read_zero(file: str, zero: dict[str, Any]) -> DeepSpeedZeroConfig:
    """The section `zero_optimization` as DeepSpeed reads it. Raises ConfigError for a value that it cannot read."""
    with _read(file, {"zero_optimization": zero}):
        return DeepSpeedZeroConfig(**copy.deepcopy(zero))


def check_values(file: str, tree: dict[str, Any]) -> None:
    """Raises ConfigError for a value that DeepSpeed cannot read."""
    tree = {key: value for key, value in tree.items() if key != "train_batch_size"}  # ranks are not counted yet
    with _read(file, tree):
        DeepSpeedConfig(copy.deepcopy(tree))
        if (level := tree.get("log_level")) is not None:  # else DeepSpeed reads it when all is built
            get_log_level_from_string(level)
