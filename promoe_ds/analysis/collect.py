"""Run a trained model over noisy images and keep what its routers chose.

Every image is shown at every timestep with its own label and without guidance (Sec. C.2 of the paper). Noise depends on
(seed, image, timestep) alone.

Legend: B images of a batch, S tokens per image, D width, L MoE layers, T timesteps, C classes, E routed experts,
I images shown, M images drawn as maps, N sampled tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Config
from promoe_ds.data import ImageDataset, build_dataset
from promoe_ds.data.codecs import Codec
from promoe_ds.data.coded_images import CodedImages
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.dit import DiT
from promoe_ds.moe.observe import prototypes_of, routers_of, top_expert, watching
from promoe_ds.moe.router import Router, Routing
from promoe_ds.sampling.generate import Precision, choose_precision, image_noise, to_pixels
from promoe_ds.utils.pictures import IMAGE_MODES


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
    precision: Precision | None = None
    """of the forwards, bf16 is autocast; by default bf16 on CUDA, fp32 elsewhere"""

    @property
    def middle(self) -> int:
        """Index of the timestep at which tokens are sampled."""
        return len(self.timesteps) // 2


@dataclass
class Observed:
    """One model's choices: empty when it is made, counted by `observe`."""

    name: str
    config: Config
    step: int
    plan: Plan
    classes: list[str]
    blocks: list[int]
    """block of each MoE layer; of a dense model its middle block, whose tokens are sampled too"""
    num_experts: int
    """E; 0 for a dense model"""
    label_I: np.ndarray
    """int64, class of each image, which is shown at each timestep"""
    prototype_LED: list[np.ndarray]
    """empty where the router has none"""
    experts: list[tuple[np.ndarray, np.ndarray]]
    """first and second matrix of each layer's experts: float32 [E, F, D], [E, D, F]"""
    pictures: np.ndarray | None = None
    """uint8 [M, H, W, 1 or 3]; None for latents without a codec"""

    def __post_init__(self) -> None:
        L, T, C, E = len(self.blocks), len(self.plan.timesteps), len(self.classes), self.num_experts
        images, S = self.images, self.config.model.tokens
        self.count_LTCE = np.zeros((L, T, C, E), np.int64)
        """edges by timestep and class"""
        self.count_LIE = np.zeros((L, images, E), np.int64)
        """edges by image, over the timesteps"""
        self.count_LSE = np.zeros((L, S, E), np.int64)
        """edges by position in the image"""
        self.nobody_L = np.zeros(L, np.int64)
        """tokens that no expert took"""
        self.weight_L = np.zeros(L)
        """sum of gate weights"""
        self.map_LMTS = np.full((L, min(self.plan.maps, images), T, S), -1, np.int64)
        """heaviest expert of each token of the first images, -1 for none"""
        self.first_LIS = np.full((L, images, S), -1, np.int16)
        """heaviest expert of each token at the first timestep, -1 for none"""
        self.kept_LIS = np.ones((L, images, S), bool)
        """whether each token has had one, and the same, at every timestep so far"""
        rng, number = np.random.default_rng(self.plan.seed + 1), min(self.plan.tokens, images * S)
        self.place_N = np.sort(rng.choice(images * S, number, replace=False))
        """of the sampled tokens, among those of all images"""
        self.class_N = self.label_I[self.place_N // S]
        """int64, of the image that each sampled token is from"""
        D, moe = self.config.model.width, self.config.moe
        self.token_LND = np.zeros((L, number, moe.router_width(D) if moe else D), np.float32)
        """inputs of the routers; D is 2D where they see the timestep too"""
        self.expert_LN = np.zeros((L, number), np.int64)
        """each token's heaviest expert, -1 for none"""
        self.first = self.time = 0

    @property
    def images(self) -> int:
        return len(self.label_I)

    @property
    def middle(self) -> int:
        """Index of the layer that figures of one layer show."""
        return len(self.blocks) // 2

    def see(self, block: int, _: Router | None, x_BSD: Tensor, routing: Routing | None) -> None:
        """Add what a router does in one forward: of the images from `first` on, at timestep `time`."""
        layer, (B, S, _D) = self.blocks.index(block), x_BSD.shape
        expert_T = np.full(B * S, -1)
        if routing is not None:
            expert_T = top_expert(routing, B * S)
            token_N, expert_N = routing.token_N.cpu().numpy(), routing.expert_N.cpu().numpy()
            image_N = self.first + token_N // S
            np.add.at(self.count_LTCE[layer, self.time], (self.label_I[image_N], expert_N), 1)
            np.add.at(self.count_LIE[layer], (image_N, expert_N), 1)
            np.add.at(self.count_LSE[layer], (token_N % S, expert_N), 1)
            self.weight_L[layer] += float(routing.weight_N.double().sum())
            self.nobody_L[layer] += B * S - len(np.unique(token_N))
        shown, expert_BS = (layer, slice(self.first, self.first + B)), expert_T.reshape(B, S)
        if self.time == 0:
            self.first_LIS[shown] = expert_BS
        self.kept_LIS[shown] &= (expert_BS >= 0) & (expert_BS == self.first_LIS[shown])
        here = max(0, min(B, self.map_LMTS.shape[1] - self.first))
        self.map_LMTS[layer, self.first : self.first + here, self.time] = expert_BS[:here]
        if self.time == self.plan.middle:
            place_N = self.place_N - self.first * S
            mine = np.flatnonzero((place_N >= 0) & (place_N < B * S))
            sampled = x_BSD.flatten(0, 1)[torch.from_numpy(place_N[mine]).to(x_BSD.device)]
            self.token_LND[layer, mine] = sampled.float().cpu().numpy()
            self.expert_LN[layer, mine] = expert_T[place_N[mine]]


def choose_images(dataset: ImageDataset, plan: Plan) -> np.ndarray:
    """int64, sorted: images drawn without replacement by the seed; all of them if there are fewer."""
    number = min(plan.images, len(dataset))
    return np.sort(np.random.default_rng(plan.seed).choice(len(dataset), number, replace=False))


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
    if isinstance(dataset, CodedImages):
        dataset.to(device)
    indices, m, routers = choose_images(dataset, plan), config.model, routers_of(model)
    layers: list[Any] = [model.blocks[i].mlp for i in routers]
    observed = Observed(
        name,
        config,
        step,
        plan,
        dataset.classes,
        blocks=list(routers) or [m.depth // 2],
        num_experts=config.moe.num_experts if config.moe else 0,
        label_I=dataset.label_B[indices],
        prototype_LED=[_numpy(p) for router in routers.values() if (p := prototypes_of(router)) is not None],
        experts=[(_numpy(layer.routed.experts.w1), _numpy(layer.routed.experts.w2)) for layer in layers],
    )
    if layers:
        watched = watching(model, observed.see)
    else:  # the inputs of an MLP stand where a router's would; the handle of its hook is a context, which removes it
        block = observed.blocks[0]
        mlp: Any = model.blocks[block].mlp
        watched = mlp.register_forward_hook(lambda _, args, __: observed.see(block, None, args[0], None))
    bf16 = choose_precision(plan.precision, device) == "bf16"
    objective, shown, starts = make_objective(config.diffusion, device), [], range(0, len(indices), plan.batch)
    with watched, tqdm(total=len(starts) * len(plan.timesteps), desc=name, unit="forward", mininterval=1) as bar:
        for observed.first in starts:
            index_B = indices[observed.first : observed.first + plan.batch]
            z_BCHW, label_B = dataset.get(index_B)
            shown.append(z_BCHW[: max(0, plan.maps - observed.first)])
            for observed.time, t in enumerate(plan.timesteps):
                eps_BCHW = image_noise(plan.seed, index_B, (m.channels, m.image_size, m.image_size), observed.time)
                x_BCHW, t_B = objective.noised(z_BCHW.to(device), eps_BCHW.to(device), t)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    model(x_BCHW, t_B, label_B)
                bar.update()
    z_MCHW = torch.cat(shown)
    if codec is not None or m.channels in IMAGE_MODES:
        observed.pictures = to_pixels(z_MCHW if codec is None else codec.to_pixels(z_MCHW))
    return observed


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def with_data(config: Config, path: str | None) -> Config:
    """The configuration reading images from `path` instead; digits have no path. Raises `ConfigError`."""
    if path is None:
        return config
    if config.data.name == "digits":
        reject("--data", path, "the model was trained on the embedded digits", "leave it out")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
