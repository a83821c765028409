"""How other projects draw the images of their published rows: presets of options, each with the source it was read in.

A preset is a set of defaults: what the command line says overrides it, and both are recorded (`sampling.json`). Scales
are those of the published rows; everything else is what the named file does by its own defaults or documented command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from promoe_ds.config.errors import reject
from promoe_ds.config.schema import Channels, Config, Interval
from promoe_ds.diffusion.flow_sde import SDE
from promoe_ds.diffusion.guidance import ALWAYS
from promoe_ds.sampling.generate import Labels, Pixels

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
ADM_METRICS = "FID, sFID, IS, precision, recall (ADM)"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One project's way; fields as of `SamplingOptions`, `Job` and the launcher's words."""

    source: str
    """repository, file and commit"""
    objective: str
    cfg: tuple[float, ...]
    sampler: str
    steps: int | str = 250
    eta: float | None = None
    shift: float | None = None
    sde: SDE | None = None
    channels: Channels
    interval: Interval = ALWAYS
    labels: Labels = "random"
    num: int = 50_000
    pixels: Pixels = "adm"
    vae: str
    """the decoder of the published numbers, for the record: which one is used, --vae says"""
    reference: str = ADM_REFERENCE
    metric: str = ADM_METRICS


PROTOCOLS: dict[str, Protocol] = {
    "promoe": Protocol(
        source="ali-vilab/ProMoE sample.py, configs/004_ProMoE_B.yaml @5915b31",
        objective="rectified_flow",
        cfg=(1.0, 1.5),
        sampler="euler",
        shift=1.0,
        channels="all",
        vae="sd-vae-ft-mse",
    ),
    "dit": Protocol(
        source="facebookresearch/DiT sample_ddp.py, models.py @ed81ce2",
        objective="ddpm",
        cfg=(1.5,),
        sampler="ddpm",
        channels=3,
        vae="sd-vae-ft-ema",
    ),
    "sit": Protocol(
        source="willisma/SiT sample_ddp.py (SDE), train_utils.py, transport/ @947f95b",
        objective="rectified_flow",
        cfg=(1.5,),
        sampler="sde",
        shift=1.0,
        sde=SDE(),
        channels=3,
        vae="sd-vae-ft-ema",
    ),
    "repa": Protocol(
        source="sihyun-yu/REPA generate.py, samplers.py, README.md @67f7145",
        objective="rectified_flow",
        cfg=(1.8,),
        sampler="sde",
        shift=1.0,
        sde=SDE(),
        channels="all",
        interval=(0.0, 700.0),
        pixels="repa",
        vae="sd-vae-ft-ema",
    ),
    "lightningdit": Protocol(
        source="hustvl/LightningDiT inference.py, transport/, configs/reproductions/..._800ep_cfg.yaml @2725fed",
        objective="rectified_flow",
        cfg=(6.7,),
        sampler="euler",
        steps=249,  # its 250 are the points of the grid, not the steps between them
        shift=1 / 0.3,  # its 0.3 shifts a time that is 1 at the data
        channels=3,
        interval=(0.0, 875.0),  # from its time 0.125 on
        vae="VA-VAE f16d32",
    ),
}
NAMES = (*PROTOCOLS, "edm2")


def find_protocol(name: str, config: Config, channels: Channels | None = None) -> Protocol:
    """The preset of this name. Raises `ConfigError`, with what else to do, if it does not apply to the model.

    Args:
        channels: what the command line guides in place of the preset's.
    """
    if name == "edm2":
        conflict = (
            "its sampler steps from noise level 80 down through a preconditioned denoiser, which no model here is"
        )
        way_out = "what else it does is --labels random --num 50000 --guidance-channels all --guidance-model WEAKER"
        reject("--protocol", name, conflict, way_out)
    protocol = PROTOCOLS[name]
    if protocol.objective != config.diffusion.name:
        conflict = f"it draws from {protocol.objective}, the model was trained with diffusion.name="
        fitting = [key for key, p in PROTOCOLS.items() if p.objective == config.diffusion.name]
        reject("--protocol", name, conflict + config.diffusion.name, f"choose {' or '.join(fitting)}")
    guided = channels or protocol.channels
    if guided != "all" and config.model.channels < guided:
        conflict = f"it guides {guided} channels, the model has model.channels={config.model.channels}"
        reject("--protocol", name, conflict, "add --guidance-channels all")
    return protocol


def protocol_record(name: str, protocol: Protocol, changed: Mapping[str, Any]) -> dict[str, Any]:
    """For `sampling.json`; `changed` are the options that the command line set otherwise."""
    told = {key: asdict(protocol)[key] for key in ("source", "vae", "reference", "metric")}
    return {"name": name, **told, "changed": dict(changed)}
