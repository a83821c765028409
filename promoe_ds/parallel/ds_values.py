"""Values of a ds_config: DeepSpeed itself reads them, before anything is built; its complaint becomes one line."""

from __future__ import annotations

import copy
import json

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from promoe_ds.config import reject
from promoe_ds.parallel.ds_config import ResolvedDS


def check_values(path: str | None, ds: ResolvedDS) -> None:
    """Raise ConfigError if DeepSpeed cannot read the configuration that `path` was resolved to."""
    file = path or "no --ds_config"
    tree = {key: value for key, value in ds.json.items() if key != "train_batch_size"}  # ranks are not counted yet
    try:
        DeepSpeedConfig(copy.deepcopy(tree))
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        section = [name for name, part in tree.items() if isinstance(part, dict) and keys and keys[0] in part][:1]
        value = json.dumps(first["input"], default=str)
        reject(f"{file}: {'.'.join([*section, *keys])}", value, first["msg"], "mend the value")
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        reject("--ds_config", file, f"DeepSpeed cannot use it: {text[:300]}", "mend the value")
