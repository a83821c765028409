"""Starting a run from weights alone (`train.init`): imported, exported, or of another run. Step 0, new optimizer state.

What the weights compute must be what the run computes; how it is trained (losses, objective, data) may differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from promoe_ds.checkpoint.load_weights import find_weights, header, open_weights, shard_files
from promoe_ds.config.decode import encode
from promoe_ds.config.schema import Config, reject
from promoe_ds.models.init import build

COMPUTED_ROUTER = ("name", "top_k", "activation", "alpha", "inference")
"""options of routers that decide the forward pass; the others are of losses and running averages"""


def computed(config: Config) -> dict[str, Any]:
    """The keys that decide what a model computes, with their values."""
    facts = {f"model.{key}": value for key, value in encode(config.model).items()}
    moe = encode(config.moe) or {}
    router = moe.pop("router", {})
    moe.pop("experts_backend", None)
    facts |= {f"moe.{key}": value for key, value in moe.items() if key != "layers"} | {
        "moe.layers": config.moe_layers()
    }
    return facts | {f"moe.router.{key}": router[key] for key in COMPUTED_ROUTER if key in router}


class InitialWeights:
    """Random access to the tensors of `train.init`, with the interface of `resume.Reader`.

    Raises:
        ConfigError: nothing there; a model that computes something else (the key and both values); a tensor that is
            missing or that the model does not have, by name.
    """

    def __init__(self, config: Config):
        assert config.train.init is not None
        file = find_weights(Path(config.train.init), "train.init")
        self.path = file.parent
        self.where: dict[str, Any] = {}
        for part in shard_files(file):
            opened = open_weights(part)
            self.where |= dict.fromkeys(opened.keys(), opened)
        theirs, mine = computed(header(file)[0]), computed(config)
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if theirs.get(key) != mine.get(key):
                conflict = f"the weights in train.init={file.parent} have {key}={theirs.get(key)}"
                reject(key, mine.get(key), conflict, f"set it so, or start from {file.parent / 'config.yaml'}")
        names = build(config).state_dict().keys()
        wrong = [f"{name} is missing" for name in names if name not in self.where]
        wrong += [f"{name} is unexpected" for name in self.where if name not in names]
        if wrong:
            reject("train.init", file, f"does not fit its own config: {wrong[0]}", "name other weights")

    def __call__(self, name: str, state: str) -> Tensor:
        """The full tensor, float32; `state` is ignored: there is one."""
        return self.where[name].get_tensor(name).float()
