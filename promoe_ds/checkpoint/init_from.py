"""Starting a run from weights alone (`train.init`): imported, exported, or of another run. Step 0, new optimizer state.

What the weights compute must be what the run computes; how it is trained (losses, objective, data) may differ. Each
option says which it is: `config.schema.Change`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from promoe_ds.checkpoint.load_weights import find_weights, header, open_weights, shard_files
from promoe_ds.config.schema import Config, differences, reject
from promoe_ds.models.init import build


def listed(config: Config) -> Config:
    """With the MoE layers as a list: what counts is which they are, not how they are written."""
    return config if config.moe is None else replace(config, moe=replace(config.moe, layers=config.moe_layers()))


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
        free = ("finetune", "resume")
        for path, theirs, mine in differences(listed(header(file)[0]), listed(config), free):
            conflict = f"the weights in train.init={file.parent} have {path}={theirs}"
            reject(path, mine, conflict, f"set it so, or start from {file.parent / 'config.yaml'}")
        names = build(config).state_dict().keys()
        wrong = [f"{name} is missing" for name in names if name not in self.where]
        wrong += [f"{name} is unexpected" for name in self.where if name not in names]
        if wrong:
            reject("train.init", file, f"does not fit its own config: {wrong[0]}", "name other weights")

    def __call__(self, name: str, state: str) -> Tensor:
        """The full tensor, float32; `state` is ignored: there is one."""
        return self.where[name].get_tensor(name).float()
