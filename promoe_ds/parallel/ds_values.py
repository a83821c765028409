"""What is inside a ds_config: DeepSpeed's own classes know the keys and read the values, before anything is built."""

from __future__ import annotations

import contextlib
import copy
import json
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NoReturn

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.logging import get_log_level_from_string
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from promoe_ds.config.errors import did_you_mean, reject, unfit

LEVELS = 5
"""of modules in modules that every model has; DeepSpeed stumbles over a `module_depth` of more, and -1 means all"""


class _Timers(BaseModel):
    throughput: DeepSpeedThroughputTimerConfig = DeepSpeedThroughputTimerConfig()


def _fit(text: str) -> str:
    if conflict := unfit(text):
        raise ValueError(conflict)
    return text


class FlopsProfiler(BaseModel, strict=True):
    """DeepSpeed has no model of this section: it would stumble over a value in the step that is profiled."""

    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    profile_step: Annotated[int, Field(ge=0)] = 1
    module_depth: Annotated[int, Field(ge=-1, le=LEVELS)] = -1
    top_modules: Annotated[int, Field(ge=0)] = 1
    detailed: bool = True
    output_file: Annotated[str, AfterValidator(_fit)] | None = None


class Passed(BaseModel, strict=True):
    """What is handed to DeepSpeed as it is, in one model, so that a complaint names the whole path of a key."""

    zero_optimization: DeepSpeedZeroConfig = DeepSpeedZeroConfig(**{})
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    timers: _Timers = _Timers()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Annotated[str, AfterValidator(get_log_level_from_string)] | None = None


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys a JSON may use -> the keys below them, to any depth."""
    out = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        out[field.alias or name] = _keys(inner[0]) if inner else {}
    return out


PASSED = _keys(Passed)
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
def _read(file: str) -> Iterator[None]:
    """DeepSpeed's complaints about values as ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        value = json.dumps(first["input"], default=str)
        reject(f"{file}: {'.'.join(map(str, first['loc']))}", value, first["msg"], "change the value")
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        reject("--ds_config", file, f"DeepSpeed cannot use it: {text[:300]}", "change the value")


def read_values(file: str, tree: dict[str, Any]) -> Passed:
    """What is handed on, as DeepSpeed reads it. Raises ConfigError for a value that it cannot read."""
    with _read(file):
        return Passed(**copy.deepcopy({key: value for key, value in tree.items() if key in PASSED}))


def try_out(file: str, tree: dict[str, Any]) -> None:
    """Raises ConfigError for a whole that DeepSpeed does not accept."""
    tree = {key: value for key, value in tree.items() if key != "train_batch_size"}  # ranks are not counted yet
    with _read(file):
        DeepSpeedConfig(copy.deepcopy(tree))
