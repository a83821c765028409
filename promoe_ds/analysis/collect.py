"""Run a trained model over noisy images and keep what its routers chose.

Every image is shown at every timestep with its own label and without guidance (Sec. C.2 of the paper). Noise depends on
(seed, image, timestep) alone.

Legend: B images of a batch, S tokens an image, D width, L MoE layers, T timesteps, C classes, E routed experts,
I images shown, M images drawn as maps, N sampled tokens.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from promoe_ds.config.schema import Config, reject
from promoe_ds.data import ImageDataset, build_dataset
from promoe_ds.data.codecs import Codec
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.dit import DiT
from promoe_ds.moe.observe import hooked, prototypes_of, routers_of, top_expert, watching
from promoe_ds.moe.router import Router, Routing
from promoe_ds.sampling.generate import image_noise, to_pixels


@dataclass(frozen=True)
class Plan:
    """What is looked at."""

    images: int = 512
    timesteps: tuple[float, ...] = (100.0, 300.0, 500.0, 700.0, 900.0)
    """1000 is noise"""
    tokens: int = 2560
    """N, sampled at the middle timestep; the paper's number for Fig. 6"""
    maps: int = 8
    """M, images shown with the experts of their tokens"""
    batch: int = 64
    seed: int = 0

    @property
    def middle(self) -> int:
        """Index of the timestep at which tokens are sampled."""
        return len(self.timesteps) // 2


@dataclass
class Observed:
    """One model's choices."""

    name: str
    config: Config
    step: int
    blocks: list[int]
    """block of each MoE layer; of a dense model its middle block, whose tokens are sampled too"""
    classes: list[str]
    plan: Plan
    images: int
    """shown at each timestep"""
    count_LTCE: np.ndarray
    """int64, edges; E is 0 for a dense model"""
    count_LIE: np.ndarray
    """int64, edges by image, over the timesteps"""
    label_I: np.ndarray
    """int64, class of each image"""
    count_LSE: np.ndarray
    """int64, edges by position in the image"""
    nobody_L: np.ndarray
    """int64, tokens that no expert took"""
    weight_L: np.ndarray
    """float64, sum of gate weights"""
    token_LND: np.ndarray
    """float32, inputs of the routers"""
    expert_LN: np.ndarray
    """int64, each token's heaviest expert, -1 for none"""
    class_N: np.ndarray
    map_LMTS: np.ndarray
    """int64, heaviest expert of each token of the images shown"""
    pictures: np.ndarray | None
    """uint8 [M, H, W, 1 or 3]; None for latents without a codec"""
    prototype_LED: list[np.ndarray] = field(default_factory=list)
    """empty where the router has none"""
    experts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """first and second matrix of each layer's experts: float32 [E, F, D], [E, D, F]"""

    @property
    def middle(self) -> int:
        """Index of the layer that figures of one layer show."""
        return len(self.blocks) // 2

    @property
    def num_experts(self) -> int:
        return self.count_LTCE.shape[-1]

    @property
    def has_experts(self) -> bool:
        return self.num_experts > 0


def choose_images(dataset: ImageDataset, plan: Plan) -> np.ndarray:
    """int64, sorted: images drawn without replacement by the seed; all of them if there are fewer."""
    number = min(plan.images, len(dataset))
    return np.sort(np.random.default_rng(plan.seed).choice(len(dataset), number, replace=False))


def watching_tokens(model: DiT, block: int, see: Any) -> AbstractContextManager[None]:
    """For a dense model: the inputs of one block's MLP, which stand where a router's would."""
    mlp: Any = model.blocks[block].mlp
    return hooked([mlp.register_forward_hook(lambda _, args, __: see(block, None, args[0], None))])


class Watcher:
    """Adds up what the routers do, a forward at a time."""

    def __init__(self, model: DiT, config: Config, plan: Plan, images: int):
        routers = routers_of(model)
        self.dense = not routers
        self.blocks = list(routers) or [config.model.depth // 2]
        L, T, C, S = len(self.blocks), len(plan.timesteps), config.model.num_classes, config.model.tokens
        E = config.moe.num_experts if config.moe and routers else 0
        self.plan, self.row = plan, {block: i for i, block in enumerate(self.blocks)}
        self.count_LTCE, self.count_LSE = np.zeros((L, T, C, E), np.int64), np.zeros((L, S, E), np.int64)
        self.count_LIE = np.zeros((L, images, E), np.int64)
        self.nobody_L, self.weight_L = np.zeros(L, np.int64), np.zeros(L)
        self.map_LMTS = np.full((L, min(plan.maps, images), T, S), -1, np.int64)
        place_N = np.random.default_rng(plan.seed + 1).choice(images * S, min(plan.tokens, images * S), replace=False)
        self.place_N = np.sort(place_N)
        """of the sampled tokens among those of all images"""
        self.tokens: list[list[np.ndarray]] = [[] for _ in self.blocks]
        self.experts: list[list[np.ndarray]] = [[] for _ in self.blocks]
        self.first, self.time, self.label_B = 0, 0, np.zeros(0, np.int64)

    def see(self, block: int, _: Router | None, x_BSD: Tensor, routing: Routing | None) -> None:
        (B, S, D), layer = x_BSD.shape, self.row[block]
        expert_T = np.full(B * S, -1) if routing is None else self._count(layer, routing, B, S)
        here = max(0, min(B, self.map_LMTS.shape[1] - self.first))
        self.map_LMTS[layer, self.first : self.first + here, self.time] = expert_T.reshape(B, S)[:here]
        if self.time == self.plan.middle:
            mine = self.place_N[(self.place_N >= self.first * S) & (self.place_N < (self.first + B) * S)]
            mine = mine - self.first * S
            x_TD = x_BSD.reshape(B * S, D)[torch.from_numpy(mine).to(x_BSD.device)]
            self.tokens[layer].append(x_TD.float().cpu().numpy())
            self.experts[layer].append(expert_T[mine])

    def _count(self, layer: int, routing: Routing, B: int, S: int) -> np.ndarray:
        token_N, expert_N = routing.token_N.cpu().numpy(), routing.expert_N.cpu().numpy()
        np.add.at(self.count_LTCE[layer, self.time], (self.label_B[token_N // S], expert_N), 1)
        np.add.at(self.count_LIE[layer], (self.first + token_N // S, expert_N), 1)
        np.add.at(self.count_LSE[layer], (token_N % S, expert_N), 1)
        self.weight_L[layer] += float(routing.weight_N.double().sum())
        self.nobody_L[layer] += B * S - len(np.unique(token_N))
        return top_expert(routing, B * S)

    def watching(self, model: DiT) -> Any:
        return watching_tokens(model, self.blocks[0], self.see) if self.dense else watching(model, self.see)


@torch.no_grad()
def observe(model: DiT, config: Config, step: int, name: str, plan: Plan, codec: Codec | None = None) -> Observed:
    """Show the images to the model, at every timestep.

    Args:
        model: in `eval`, on any device.
        config: its configuration; `config.data` says where the images are.
        codec: decodes latents for the pictures.

    Raises:
        ConfigError: the data cannot be read, or do not fit the model.
    """
    dataset, device = build_dataset(config), next(model.parameters()).device
    indices, m = choose_images(dataset, plan), config.model
    objective, watcher = make_objective(config.diffusion, device), Watcher(model, config, plan, len(indices))
    labels, shown = [], []
    starts = range(0, len(indices), plan.batch)
    with (
        watcher.watching(model),
        tqdm(total=len(starts) * len(plan.timesteps), desc=name, unit="forward", mininterval=1) as bar,
    ):
        for start in starts:
            index_B = indices[start : start + plan.batch]
            z_BCHW, label_B = dataset.get(index_B)
            labels.append(label_B.numpy())
            shown.append(z_BCHW[: max(0, plan.maps - start)])
            watcher.first, watcher.label_B = start, label_B.numpy()
            for watcher.time, t in enumerate(plan.timesteps):
                eps_BCHW = image_noise(plan.seed, index_B, (m.channels, m.image_size, m.image_size), watcher.time)
                model(*objective.noised(z_BCHW.to(device), eps_BCHW.to(device), t), label_B)
                bar.update()
    counts = ("count_LTCE", "count_LIE", "count_LSE", "nobody_L", "weight_L", "map_LMTS")
    facts, label_I = {key: getattr(watcher, key) for key in counts}, np.concatenate(labels)
    return Observed(
        **{"name": name, "config": config, "step": step, "blocks": watcher.blocks, "plan": plan, **facts},
        images=len(indices),
        label_I=label_I,
        classes=list(dataset.classes),
        token_LND=np.stack([np.concatenate(parts) for parts in watcher.tokens]),
        expert_LN=np.stack([np.concatenate(parts) for parts in watcher.experts]),
        class_N=label_I[watcher.place_N // m.tokens],
        pictures=_pictures(torch.cat(shown), codec),
        prototype_LED=[
            p.detach().float().cpu().numpy() for r in routers_of(model).values() if (p := prototypes_of(r)) is not None
        ],
        experts=_expert_weights(model),
    )


def _pictures(z_MCHW: Tensor, codec: Codec | None) -> np.ndarray | None:
    if codec is None and z_MCHW.shape[1] not in (1, 3):
        return None
    return to_pixels(z_MCHW if codec is None else codec.to_pixels(z_MCHW))


def _expert_weights(model: DiT) -> list[tuple[np.ndarray, np.ndarray]]:
    layers: list[Any] = [model.blocks[i].mlp for i in routers_of(model)]
    stacks = [layer.routed.experts for layer in layers]
    return [(s.w1.detach().float().cpu().numpy(), s.w2.detach().float().cpu().numpy()) for s in stacks]


def with_data(config: Config, path: str | None) -> Config:
    """The configuration reading images from `path` instead; digits have no path. Raises `ConfigError`."""
    if path is None:
        return config
    if config.data.name == "digits":
        reject("--data", path, "the model was trained on the embedded digits", "leave it out")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
