"""ProMoE diffusion transformers trained with DeepSpeed expert parallelism.

`load_model` and `generate` are the public Python API (promoe_ds/api.py); `ConfigError` is what a user's mistake raises.
Importing this package imports nothing else: torch comes with the first use, DeepSpeed with training alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from promoe_ds._version import __version__ as __version__

if TYPE_CHECKING:
    from promoe_ds.api import generate as generate
    from promoe_ds.api import load_model as load_model
    from promoe_ds.config.errors import ConfigError as ConfigError
    from promoe_ds.diffusion.flow_sde import SDE as SDE

__all__ = ["SDE", "ConfigError", "generate", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ConfigError":
        from promoe_ds.config import errors

        return errors.ConfigError
    from promoe_ds import api

    return getattr(api, name)
