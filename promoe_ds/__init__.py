"""ProMoE diffusion transformers trained with DeepSpeed expert parallelism.

`load_model` and `generate` are the public Python API (promoe_ds/api.py); `ConfigError` is what a user's mistake raises.
Importing this package imports nothing else: torch comes with the first use, DeepSpeed with training alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promoe_ds.api import generate as generate
    from promoe_ds.api import load_model as load_model
    from promoe_ds.config.schema import ConfigError as ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "generate", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module("promoe_ds.config.schema" if name == "ConfigError" else "promoe_ds.api"), name
    )
