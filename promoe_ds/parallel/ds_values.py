"""What is inside a ds_config: DeepSpeed's own classes know the keys and read the values, before anything is built."""

from __future__ import annotations

import copy
import json
import typing
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import BaseModel, ValidationError

from promoe_ds.config.schema import reject
from promoe_ds.parallel.ds_config import PASSED, ResolvedDS, unknown


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys a JSON may use -> the keys below them, to any depth."""
    out = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        out[field.alias or name] = _keys(inner[0]) if inner else {}
    return out


KEYS: dict[str, Any] = dict.fromkeys(PASSED, {}) | {
    "zero_optimization": _keys(DeepSpeedZeroConfig),
    "comms_logger": _keys(CommsLoggerConfig),
    "timers": {"throughput": _keys(DeepSpeedThroughputTimerConfig)},
    "flops_profiler": dict.fromkeys(vars(DeepSpeedFlopsProfilerConfig({})), {}),
}
"""Keys handed to DeepSpeed -> the keys below them. It ignores unknown ones below `timers`, below `flops_profiler`, and
wherever their value is "auto"."""


def _check_keys(prefix: str, tree: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in tree.items():
        if key not in known:
            unknown(f"{prefix}{key}", value, key, known)
        if isinstance(value, dict):
            _check_keys(f"{prefix}{key}.", value, known[key])


def check_values(path: str | None, ds: ResolvedDS) -> None:
    """Check what `path` was resolved to.

    Raises:
        ConfigError: DeepSpeed does not know a key, or cannot read a value.
    """
    file = path or "no --ds_config"
    _check_keys(f"{file}: ", {key: value for key, value in ds.json.items() if key in PASSED}, KEYS)
    tree = {key: value for key, value in ds.json.items() if key != "train_batch_size"}  # ranks are not counted yet
    try:
        DeepSpeedConfig(copy.deepcopy(tree))
        if (level := tree.get("log_level")) is not None:  # else DeepSpeed reads it when all is built
            get_log_level_from_string(level)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        section = [name for name, part in tree.items() if isinstance(part, dict) and keys and keys[0] in part][:1]
        value = json.dumps(first["input"], default=str)
        reject(f"{file}: {'.'.join([*section, *keys])}", value, first["msg"], "mend the value")
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        reject("--ds_config", file, f"DeepSpeed cannot use it: {text[:300]}", "mend the value")
