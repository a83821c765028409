"""The seam between an objective and the rest: training calls `loss`, sampling calls `sample`, of the one by its name.

Legend: B images, C channels, H W side. An objective is stateless but for its tables on one device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.config.schema import SHIFTS, Config, DiffusionConfig
from promoe_ds.diffusion import ddpm
from promoe_ds.diffusion import rectified_flow as flow
from promoe_ds.diffusion.ddpm_samplers import Predict, ancestral, ddim, spaced_timesteps
from promoe_ds.diffusion.flow_sde import SDE, euler_maruyama
from promoe_ds.diffusion.rectified_flow import Callback, euler, heun, sigma_schedule

Forward = Callable[[Tensor, Tensor], Any]
"""(x [B, C, H, W], t float32 [B] in 0..1000) -> an output whose `prediction` is [B, C or 2C, H, W]"""
Losses = dict[str, Tensor]
"""float32 scalars by name"""
AllNoise = Callable[[int | None], Tensor]
"""step (from 0), or None for what sampling starts from -> standard normal noise [B, C, H, W]"""


@dataclass(frozen=True)
class Solver:
    """One way of drawing images with an objective."""

    sampler: str
    """one of the objective's"""
    steps: int | str
    """as the objective takes them"""
    eta: float = 0.0
    """of ddim"""
    shift: float | None = None
    """of a flow's noise levels; None: as it was trained"""
    sde: SDE = SDE()
    """of sde"""


class Objective(ABC):
    """What is learned from noisy images, and how images are drawn with it."""

    samplers: ClassVar[tuple[str, ...]]
    """names of its samplers, the default first"""
    aux_loss_weights: dict[str, float]
    """losses besides "diffusion", each with its weight in the training loss"""

    @abstractmethod
    def __init__(self, config: DiffusionConfig, device: torch.device): ...

    @abstractmethod
    def loss(self, forward: Forward, z_BCHW: Tensor, eps_BCHW: Tensor, gauss_B: Tensor) -> tuple[Any, Losses]:
        """One forward of a batch and its losses.

        Args:
            z_BCHW: images or latents, float32.
            eps_BCHW: standard normal noise, as z.
            gauss_B: a standard normal draw per image, which chooses its timestep.

        Returns:
            The output of `forward`, and float32 scalars by name: "diffusion" (weight 1) and those of
            `aux_loss_weights`, unweighted, each the mean over the batch.
        """

    @abstractmethod
    def noised(self, z_BCHW: Tensor, eps_BCHW: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """(z with the noise of one timestep, t_B float32): what the model is given there.

        Args:
            time: in 0..1000; where times are discrete, the nearest one that is trained.
        """

    @abstractmethod
    def timesteps(self, solver: Solver) -> list[float]:
        """The times that a sampler tells the model at the start of each step, from 1000 (noise) downwards.

        Raises:
            ValueError: there is no such way of `steps`; says why, without the value.
        """

    @abstractmethod
    def sample(self, predict: Predict, noise: AllNoise, solver: Solver, callback: Callback | None = None) -> Tensor:
        """Images [B, C, H, W] from noise.

        Args:
            predict: the guided model, with its variance channels where it has them.
            noise: `noise(None)` is what sampling starts from; samplers that add noise ask for that of each step.
        """


class RectifiedFlow(Objective):
    """Velocity regression on straight paths, `rectified_flow.py`; the loss has one term."""

    samplers = ("euler", "heun", "sde")

    def __init__(self, config: DiffusionConfig, device: torch.device):
        self.config = config
        self.aux_loss_weights = {}

    def loss(self, forward: Forward, z_BCHW: Tensor, eps_BCHW: Tensor, gauss_B: Tensor) -> tuple[Any, Losses]:
        sigma_B = self.levels(gauss_B)
        output = forward(flow.interpolate(z_BCHW, eps_BCHW, sigma_B), flow.TIME_SCALE * sigma_B)
        loss_B = flow.loss_per_image(output.prediction, flow.target(z_BCHW, eps_BCHW))
        return output, {"diffusion": loss_B.mean()}

    def levels(self, gauss_B: Tensor) -> Tensor:
        """The noise levels sigma [B] that are trained, 1 is noise, from the standard normal draws; dtype of these."""
        c = self.config
        if c.timesteps == "logit_normal":
            return flow.sigma_from_gauss(gauss_B, c.logit_mean, c.logit_std, c.shift)
        if c.timesteps == "uniform":
            return flow.shift_sigma(flow.uniform_from_gauss(gauss_B), c.shift).to(gauss_B.dtype)
        uniform_B, draw_B = flow.mixed_gauss(gauss_B, c.uniform_share)
        uniform_sigma_B = flow.shift_sigma(flow.uniform_from_gauss(draw_B), c.shift)
        logit_normal_B = flow.sigma_from_gauss(draw_B, c.logit_mean, c.logit_std, c.shift)
        return torch.where(uniform_B, uniform_sigma_B, logit_normal_B).to(gauss_B.dtype)

    def noised(self, z_BCHW: Tensor, eps_BCHW: Tensor, time: float) -> tuple[Tensor, Tensor]:
        sigma_B = z_BCHW.new_full((len(z_BCHW),), time / flow.TIME_SCALE)
        return flow.interpolate(z_BCHW, eps_BCHW, sigma_B), flow.TIME_SCALE * sigma_B

    def _sigmas(self, solver: Solver) -> list[float]:
        if not isinstance(solver.steps, int):
            raise ValueError("rectified flow takes a number of steps")
        shift = self.config.shift if solver.shift is None else solver.shift
        if solver.sampler == "sde":
            return solver.sde.sigmas(solver.steps, shift)
        return sigma_schedule(solver.steps, shift)

    def timesteps(self, solver: Solver) -> list[float]:
        return [flow.TIME_SCALE * sigma for sigma in self._sigmas(solver)[:-1]]

    def sample(self, predict: Predict, noise: AllNoise, solver: Solver, callback: Callback | None = None) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return predict(x, flow.TIME_SCALE * sigma)[:, : x.shape[1]]

        sigmas = self._sigmas(solver)
        if solver.sampler == "sde":
            return euler_maruyama(velocity, noise(None), sigmas, noise, solver.sde, callback)
        return {"euler": euler, "heun": heun}[solver.sampler](velocity, noise(None), sigmas, callback)


class DDPM(Objective):
    """Noise prediction with a learned variance range, `ddpm.py`; trained on L_simple + lambda L_vlb."""

    samplers = ("ddpm", "ddim")

    def __init__(self, config: DiffusionConfig, device: torch.device):
        self.config = config.ddpm
        self.schedule = ddpm.Schedule.of(ddpm.linear_betas(self.config.num_steps)).to(device)
        # L_vlb is the *sum* over t, so lambda L_vlb = lambda T E_t[L_t]: weight 1 at T = 1000, as in ADM and DiT.
        self.aux_loss_weights = {"vb": ddpm.VB_LAMBDA * self.config.num_steps}

    def loss(self, forward: Forward, z_BCHW: Tensor, eps_BCHW: Tensor, gauss_B: Tensor) -> tuple[Any, Losses]:
        s = self.schedule
        t_B = ddpm.timestep_from_gauss(gauss_B, s.num_steps)
        x_BCHW = ddpm.q_sample(s, z_BCHW, eps_BCHW, t_B)
        output = forward(x_BCHW, s.time_T.index_select(0, t_B).float())
        mse_B, vb_B = ddpm.losses_per_image(s, output.prediction, z_BCHW, eps_BCHW, x_BCHW, t_B)
        return output, {"diffusion": mse_B.mean(), "vb": vb_B.mean()}

    def noised(self, z_BCHW: Tensor, eps_BCHW: Tensor, time: float) -> tuple[Tensor, Tensor]:
        nearest = int((self.schedule.time_T - time).abs().argmin())
        t_B = torch.full((len(z_BCHW),), nearest, device=z_BCHW.device)
        return ddpm.q_sample(self.schedule, z_BCHW, eps_BCHW, t_B), self.schedule.time_T[t_B].float()

    def timesteps(self, solver: Solver) -> list[float]:
        kept = spaced_timesteps(self.config.num_steps, solver.steps)
        return self.schedule.respaced(kept).time_T.flip(0).tolist()

    def sample(self, predict: Predict, noise: AllNoise, solver: Solver, callback: Callback | None = None) -> Tensor:
        schedule = self.schedule.respaced(spaced_timesteps(self.config.num_steps, solver.steps))
        if solver.sampler == "ddim":
            return ddim(predict, noise(None), schedule, noise, solver.eta, self.config.clip_denoised, callback)
        return ancestral(predict, noise(None), schedule, noise, self.config.clip_denoised, callback)


OBJECTIVES: dict[str, type[Objective]] = {"rectified_flow": RectifiedFlow, "ddpm": DDPM}


def make_objective(config: DiffusionConfig, device: torch.device | str = "cpu") -> Objective:
    """The objective that `diffusion.name` names, with its tables on `device`."""
    return OBJECTIVES[config.name](config, torch.device(device))


def check_steps(config: DiffusionConfig, solver: Solver, option: str) -> int:
    """How many steps these are. Raises ConfigError, naming `option`, where the sampler has no such steps."""
    try:
        return len(make_objective(config).timesteps(solver))
    except ValueError as error:
        reject(option, solver.steps, str(error), "choose another number of steps")


def choose_sampler(
    config: Config,
    name: str | None,
    steps: int | str,
    eta: float = 0.0,
    shift: float | None = None,
    sde: SDE | None = None,
) -> tuple[Solver, int]:
    """The solver of these options (by default the objective's first sampler) and its number of steps.

    Args:
        shift: of a flow's noise levels; None: `sample.shift`, and where that is null, as it was trained.
        sde: None: SiT's defaults.

    Raises:
        ConfigError: the objective has no such sampler; the sampler no such steps, or an option that means nothing.
    """
    samplers = OBJECTIVES[config.diffusion.name].samplers
    chosen = name or samplers[0]
    if chosen not in samplers:
        conflict = f"the model was trained with diffusion.name={config.diffusion.name}"
        way_out = did_you_mean(chosen, samplers, f"choose {' or '.join(samplers)}")
        reject("--sampler", chosen, conflict, way_out)
    if not 0 <= eta <= 1:
        reject("--eta", eta, "must lie in [0, 1]", "choose such a value")
    if eta and chosen != "ddim":
        reject("--eta", eta, f"the sampler {chosen} has no eta", "remove it, or add --sampler ddim")
    if shift is not None and config.diffusion.name != "rectified_flow":
        reject("--shift", shift, f"the sampler {chosen} has no noise levels to shift", "remove it")
    if shift is not None and not SHIFTS[0] <= shift < SHIFTS[1]:
        reject("--shift", shift, f"must lie in [{SHIFTS[0]:g}, {SHIFTS[1]:g})", "choose such a value; 1 is none")
    if sde is not None and chosen != "sde":
        conflict = "has no diffusion and no last step, which belong to the sampler sde"
        reject("--sampler", chosen, conflict, "remove them" + (", or add --sampler sde" if "sde" in samplers else ""))
    if sde is not None and (problem := sde.problem()):
        field, why, way_out = problem
        reject(f"--{field.replace('_', '-')}", getattr(sde, field), why, way_out)
    solver = Solver(chosen, steps, eta, config.sample.shift if shift is None else shift, sde or SDE())
    return solver, check_steps(config.diffusion, solver, "--steps")
