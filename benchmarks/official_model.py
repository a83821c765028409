"""The official code beside ours: what `official_parity.py` compares, and the training step that `throughput.py` times.

Of that code only the folder `models` is used; where its dependency timm is missing, a patch embedding stands in.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.interleaved import Clock, Work

WIDTH, HEADS, DEPTH, SIDE, CHANNELS, BATCH, CLASSES = 64, 4, 4, 8, 3, 32, 1000
LR, CLIP = 1e-3, 0.5
State = dict[str, Tensor]


class Family(NamedTuple):
    """One of `formats.official.FAMILIES`, as the official code builds it."""

    module: str
    experts: dict[str, Any]
    """its section MoE_config; {} for a dense model"""


BASELINE = {"n_shared_experts": 0, "num_experts": 8, "capacity": 1, "init_MoeMLP": False, "interleave": True}
PROMOE = {
    "num_routed_experts": 12, "moe_intermediate_size": 2 * WIDTH, "shared_expert_intermediate_size": 2 * WIDTH,
    "use_shared_expert": True, "interleave": True, "init_MoeMLP": False, "top_k": 1, "router_weight_mode": "identity",
    "routing_contrastive_lam": 1, "use_top_k_for_routing_contrastive": True, "routing_contrastive_temperature": 0.07,
}  # fmt: skip
FAMILIES = {
    "dense": Family("models_DiT", {}),
    "token_choice": Family("models_TCDiT", BASELINE),
    "expert_choice": Family("models_ECDiT", BASELINE),
    "diffmoe": Family("models_DiffMoE", BASELINE),
    "promoe": Family("models_ProMoE_TC", PROMOE),
    "promoe_ec": Family("models_ProMoE_EC", PROMOE),
}


# --------------------------------------------------------------------------------------------------- what both train on


def write_pack(path: Path, images: int = 2000) -> Path:
    """Random pictures of 1000 classes as a packed npz. PNG, so that they decode to the same bits everywhere."""
    from PIL import Image

    rng, files = np.random.default_rng(0), []
    for _ in range(images):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, CHANNELS), dtype=np.uint8)).save(file, "PNG")
        files.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
    names = np.array([f"class_{i:03d}" for i in range(CLASSES)])
    offsets = np.cumsum([0, *map(len, files)])
    labels = np.arange(images) % CLASSES
    np.savez(path, classes=names, train_jpeg=np.concatenate(files), train_offsets=offsets, train_labels=labels)
    return path


def drawn(shapes: dict[str, torch.Size]) -> State:
    """Weights for the names of the official layout: fan-in scaled, biases small, so that every part shows.

    Thresholds of DiffMoE start at 0 and their decay is 0.95, as in the official code; positions are the table.
    """
    from promoe_ds.models.layers import grid_sinusoids

    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        rows = math.prod(shape[1:]) if len(shape) > 1 else 0
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        state[name] = noise * (rows**-0.5 if rows else 0.1)
        if name.endswith("expert_threshold"):
            state[name] = torch.zeros(shape)
        elif name.endswith("ema_decay"):
            state[name] = torch.full(shape, 0.95)
        elif name == "pos_embed":
            state[name] = grid_sinusoids(WIDTH, SIDE // 2)
    return state


def imported(family: str, checkpoint: Path, out: Path) -> Path:
    """`promoe-import` of an official checkpoint, and the configuration to train it as the official code does."""
    from promoe_ds.formats import weights
    from promoe_ds.formats.importing import import_checkpoint

    pool = ["moe.router.inference=pool"] if family == "diffmoe" else []
    made = import_checkpoint(checkpoint, "raw", family, None, [f"model.heads={HEADS}", *pool])
    return weights.write(made, out)


def training(folder: Path, pack: Path, steps: int, ep: int = 1) -> Any:
    """The configuration of a run of ours from an imported folder."""
    from promoe_ds.recipes.load import load_config

    return load_config(str(folder / "config.yaml"), [
        f"train.init={folder}", f"train.steps={steps}", f"train.checkpoint_every={steps}", "train.log_every=1",
        f"train.global_batch_size={BATCH}", "train.micro_batch_size=null", "train.precision=fp32",
        f"optimizer.lr={LR}", f"optimizer.clip_grad_norm={CLIP}", "data.name=images", f"data.path={pack}",
        "data.hflip=false", "diffusion.label_drop=0.2", f"parallel.expert_parallel={ep}", "sample.steps=1",
        "sample.per_class=1", "sample.classes=1", "parallel.timeout_minutes=5",
    ])  # fmt: skip


def shapes_of(family: str) -> dict[str, torch.Size]:
    """Names and shapes of an official checkpoint, without the official code."""
    from promoe_ds.formats.official import to_official
    from promoe_ds.models.init import build
    from promoe_ds.recipes.load import load_config

    prototypes = family.startswith("promoe")
    experts = FAMILIES[family].experts.get("num_experts", 12)
    flag = str(prototypes).lower()
    moe = ["moe=null"] if family == "dense" else [
        f"moe.router={{name: {family}}}", f"moe.num_experts={experts}", f"moe.num_shared={int(prototypes)}",
        f"moe.conditional={flag}", f"moe.hidden_ratio={2 if prototypes else 4}",
    ]  # fmt: skip
    model = {"depth": DEPTH, "width": WIDTH, "heads": HEADS, "image_size": SIDE, "channels": CHANNELS,
             "num_classes": CLASSES, "learn_sigma": "true"}  # fmt: skip
    config = load_config("tiny", [*(f"model.{key}={value}" for key, value in model.items()), *moe])
    return {name: tensor.shape for name, tensor in to_official(dict(build(config).state_dict()), config).items()}


# ---------------------------------------------------------------------------------------------------- the official code


class Section(dict[str, Any]):
    """A configuration whose keys are attributes too, which is all that the models need of easydict."""

    __getattr__ = dict.__getitem__


class PatchEmbedding(nn.Module):
    """Stands in for timm's: a convolution of stride P, its cells as tokens, row by row."""

    def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool = True):
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


def official_model(official: Path, family: str, **sizes: int) -> nn.Module:
    """A model of the official code, a small one by default. Labels are dropped by us, so it must not drop any."""
    if str(official) not in sys.path:
        sys.path.insert(0, str(official))
    if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
        for name in ("timm", "timm.models", "timm.models.vision_transformer"):
            sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(PatchEmbed=PatchEmbedding, Mlp=None)
    kind = FAMILIES[family]
    sizes = {"input_size": SIDE, "in_channels": CHANNELS, "patch_size": 2, "hidden_size": WIDTH, "depth": DEPTH,
             "num_heads": HEADS, "num_classes": CLASSES} | sizes  # fmt: skip
    hidden = {key: 2 * sizes["hidden_size"] for key in kind.experts if key.endswith("intermediate_size")}
    experts = {"MoE_config": Section(kind.experts | hidden)} if kind.experts else {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which blocks are sparse
        model = importlib.import_module(f"models.{kind.module}").DiT(**sizes, **experts)
    model.y_embedder.dropout_prob = 0.0
    return model


def losses(
    model: nn.Module, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor, target_BCHW: Tensor
) -> tuple[Tensor, Tensor]:
    """(velocity error, what is differentiated); auxiliary losses of ProMoE and TC-DiT enter in the backward pass."""
    output: Any = model(x_BCHW, t_B, context=label_B)
    aux: Any = 0.0
    if isinstance(output, tuple):  # DiffMoE: ..., targets and logits of each layer's capacity predictor, their weight
        output, _, _, targets, logits, weight = output
        pairs = zip(logits, targets, strict=True)
        aux = weight * sum(nn.functional.binary_cross_entropy_with_logits(z, y) for z, y in pairs)
    error = (output[:, : target_BCHW.shape[1]] - target_BCHW).square().mean()
    return error, error + aux


def noisy(batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, t, labels, target) of rectified flow with logit-normal levels, from the draws of a batch."""
    sigma_B = torch.sigmoid(batch.gauss_B)
    s = sigma_B[:, None, None, None]
    x_BCHW = (1 - s) * batch.x_BCHW + s * batch.noise_BCHW
    return x_BCHW, 1000 * sigma_B, batch.label_B, batch.noise_BCHW - batch.x_BCHW


def train_official(model: nn.Module, config: Any, steps: int) -> list[dict[str, float]]:
    """Train as the official train.py does, on the batches that our trainer gets; `loss/diffusion`, `grad_norm`."""
    from promoe_ds.data import build_dataset
    from promoe_ds.data.batches import BatchMaker

    maker, records = BatchMaker(config, build_dataset(config)), []
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    model.train()
    for step in range(steps):
        (batch,) = maker.step(step)
        error, total = losses(model, *noisy(batch))
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
        records.append({"loss/diffusion": error.item(), "grad_norm": norm.item()})
    return records


# ------------------------------------------------------------------------------------------------------- its speed


def official_twin(official: Path, model: Any) -> nn.Module:
    """The official ProMoE in the sizes of ours and with its weights, in memory of its own."""
    from promoe_ds.formats.official import to_official

    m = model.config.model
    twin = official_model(official, "promoe", input_size=m.image_size, in_channels=m.channels, hidden_size=m.width,
                          depth=m.depth, num_heads=m.heads, num_classes=m.num_classes)  # fmt: skip
    twin.load_state_dict(to_official(dict(model.state_dict()), model.config))
    return twin.train()


def official_step(model: nn.Module, batch: Any, precision: str, lr: float, decay: float) -> Work:
    """A step as its train.py makes it: fused AdamW over all parameters, EMA tensor by tensor.

    Args:
        batch: of `noisy`.
    """
    device, ema = batch.x_BCHW.device, [p.detach().clone() for p in model.parameters()]
    adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def work(clock: Clock) -> None:
        clock.mark()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _, total = losses(model, *noisy(batch))
        clock.mark()
        total.backward()
        clock.mark()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for average, p in zip(ema, model.parameters(), strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)
        clock.mark()

    return work
