"""Every module of this folder is imported, so a new router is one new file and no list to edit."""

import importlib
import pkgutil

from promoe_ds.moe.router import ROUTERS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ROUTERS"]
