"""The training loop: read `Trainer.run` from top to bottom.

One optimizer step is a pure function of (state, seed, step): data, noise, timesteps, label drops and flips are drawn
for the global batch and sliced by rank, so the loss curve does not depend on the topology, and a resumed run repeats
exactly what the interrupted one would have done.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from promoe_ds import accounting
from promoe_ds.config import Config, ConfigError, dump, reject
from promoe_ds.data import ImageDataset, build_dataset
from promoe_ds.data.batches import Batch, BatchStream
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.dit import DiTOutput
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.routers import ROUTERS
from promoe_ds.moe.routing import Router, RoutingContext
from promoe_ds.parallel.ds_config import ResolvedDS
from promoe_ds.parallel.engine import Engine, check_deepspeed_values
from promoe_ds.parallel.expert_parallel import local_part, parallelize
from promoe_ds.parallel.meter import KINDS, PARTS, Meter
from promoe_ds.parallel.topology import Topology, barrier, connect, gather_objects, sum_over_ranks
from promoe_ds.sampling import draw_grid
from promoe_ds.train import checkpoint, resuming
from promoe_ds.train.checkpoint import claim
from promoe_ds.train.metrics import MetricsLog, Throughput, expert_load, last_logged_step, memory_gib
from promoe_ds.train.saving import Saver, ema_state_dict

DONE, USER_ERROR, RESUMABLE = 0, 2, 85
"""exit codes"""


REPEAT_SECONDS = 5.0
"""a launcher forwards a signal that its process group also got: a repeat within this time is the same request"""


class TrainingStopped(Exception):
    """The run cannot go on (not a user's mistake); raised on every rank alike; the message is one line."""


class RankFailed(Exception):
    """A user's mistake that one rank alone has met (a damaged file); the message is one line."""


def check_history(run: Path, found: Path | None, config: Config) -> int:
    """The step to continue from, 0 for a fresh run.

    Raises:
        ConfigError: the run is past `train.steps`, or its log shows that it had checkpoints and they are gone.
    """
    if found:
        step = checkpoint.step_of(found)
        if step > config.train.steps:
            reject("train.steps", config.train.steps, f"{run} is at step {step} already", "raise it")
        return step
    logged, saved = last_logged_step(run), resuming.saved_config(run)
    if saved and logged > saved.get("train", {}).get("checkpoint_every", logged):
        conflict = f"metrics.jsonl reaches step {logged}, but checkpoints/ is empty"
        reject("--run", run, conflict, "bring the checkpoints back, or remove the folder to start again")
    return 0


class Trainer:
    """A run on one rank: model, engine, data and log, at some step."""

    def __init__(self, config: Config, ds: ResolvedDS, run: Path, topology: Topology):
        self.config, self.run_folder, self.topology = config, run, topology
        self.ranks = checkpoint.Ranks(topology.rank, topology.world, lambda value: gather_objects(value, topology))
        self.dataset: ImageDataset = build_dataset(config)  # before any collective: its errors are the user's
        saved = resuming.saved_config(run)
        if saved is not None:
            resuming.check_same_run(saved, config, run)
        self.lock = claim(run) if topology.rank == 0 else None
        connect(topology)
        check_deepspeed_values(ds)
        torch.backends.cudnn.allow_tf32 = config.train.precision != "fp32"
        self.stop_since: float | None = None
        found = checkpoint.find_whole(run, self.ranks)
        if found:
            resuming.check_same_run(checkpoint.manifest(found)["config"], config, found)
        self.step = check_history(run, found, config)
        self.engine = self._make_engine(ds, found)
        facts = {"world": topology.world, "ep": topology.ep, "stage": ds.stage, "torch": torch.__version__}
        self.saver = Saver(run, self.engine, config, self.ranks, facts, self._say)
        self.objective = make_objective(config.diffusion, topology.device)
        router_weights = ROUTERS[config.moe.router.name].aux_weights(config.moe.router) if config.moe else {}
        self.aux_weights = self.objective.aux_weights | router_weights
        self.terms = ["loss", "loss/diffusion", *(f"loss/{name}" for name in self.aux_weights)]
        self.log = self._open_log(ds) if topology.rank == 0 else None
        self.throughput = Throughput()
        self.meter = Meter(topology.device).install(self.model) if config.train.measure else None
        self.image_flops = accounting.train_flops(config, config.diffusion.label_drop)

    def _open_log(self, ds: ResolvedDS) -> MetricsLog:
        """Everything is checked: from here on the run folder is written."""
        run = self.run_folder
        try:
            for name, text in (("config.yaml", dump(self.config)), ("ds_config.json", json.dumps(ds.json, indent=1))):
                temporary = run / f".{name}.tmp"
                temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
                os.replace(temporary, run / name)
            return MetricsLog(run, self.step, self.config.train.steps)
        except OSError as error:
            raise RankFailed(f"--run={run}: cannot be written ({error}); choose another folder") from error

    def _make_engine(self, ds: ResolvedDS, found: Path | None) -> Engine:
        topology = self.topology
        model = parallelize(build(self.config), topology)
        self.total_parameters = accounting.count_parameters(self.config).total
        materialize(model, self.config.train.seed, topology.device)
        self.model, self.routers = model, [m for m in model.modules() if isinstance(m, Router)]
        self.positions = {n: p.detach().cpu() for n, p in model.named_parameters() if not p.requires_grad}
        reader = resuming.Reader(found) if found else None
        if reader:
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            resuming.load_weights(reader, trained, lambda p, full: local_part(p, full, topology))
            resuming.load_buffers(reader, dict(model.named_buffers()))
        engine = Engine(model, self.config, ds, topology)
        if reader:
            resuming.restore(reader, engine, self.step, quiet=topology.rank > 0)
        return engine

    def _fixed(self) -> dict[str, Tensor]:
        """What the model holds besides trained parameters: the position table, and the buffers of routers as of now."""
        return self.positions | dict(self.model.named_buffers())

    # ------------------------------------------------------------------------------------------------------- loop

    def run(self) -> int:
        """Train from the current step to `train.steps`; returns the exit code."""
        cfg = self.config.train
        self._say(self._banner())
        signal.signal(signal.SIGTERM, self._on_signal)
        with BatchStream(self.config, self.dataset, self.topology.rank, self.topology.world, self.step) as stream:
            while self.step < cfg.steps:
                try:
                    record = self._train_step(self._next(stream))
                except TrainingStopped:  # on every rank alike: a checkpoint under way is completed first
                    self.saver.finish(tolerant=True)
                    raise
                if self.saver.job:
                    self._paused(self.saver.poll)
                if self.step % cfg.log_every == 0 or self.step in (1, cfg.steps):
                    self._report(record)
                last = self.step == cfg.steps or record["stop"]
                if last or self.step % cfg.checkpoint_every == 0:
                    self._paused(self.saver.save, self.step, self._fixed(), last)
                if cfg.sample_every and self.step % cfg.sample_every == 0 and self.step < cfg.steps:
                    self._paused(self._draw_samples)
                if record["stop"] and self.step < cfg.steps:
                    self._say(f"stopped by a signal at step {self.step}; the same command continues")
                    return RESUMABLE
        self._paused(self._draw_samples)
        weights = checkpoint.folder(self.run_folder, self.step) / checkpoint.EMA
        self._say(f"done: {self.step} steps; weights in {weights}")
        return DONE

    def _next(self, stream: BatchStream) -> list[Batch]:
        try:
            return next(stream)
        except ConfigError as error:
            raise RankFailed(f"rank {self.topology.rank}: {error}") from error

    def _train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step; returns the losses, gradient norm and expert load."""
        totals, load_LE = torch.zeros(len(self.terms) + 1, device=self.topology.device), None
        for batch in batches:
            with self._part("forward"):
                output, terms = self._forward(batch)
            with self._part("backward"):
                self.engine.backward(terms[0])
            totals[:-1] += torch.stack(terms).detach() / len(batches)
            load_LE = output.load_LE if load_LE is None else load_LE + output.load_LE
        totals[-1] = float(self.stop_since is not None)
        *losses, stop = self._mean_over_ranks(totals)
        with self._part("optimizer"):
            norm = self.engine.step()
        self.step += 1
        if not math.isfinite(norm):
            raise TrainingStopped(f"step {self.step}: the gradient norm is {norm}; the last checkpoint is unharmed")
        for router in self.routers:
            router.after_step(self.engine.all_reduce)
        self.throughput.images += self.config.train.global_batch_size
        return dict(zip(self.terms, losses, strict=True)) | {"grad_norm": norm, "load": load_LE, "stop": stop > 0}

    def _forward(self, batch: Batch) -> tuple[DiTOutput, list[Tensor]]:
        """-> model output and [total loss, diffusion loss, auxiliary losses]; L = Eq. (1) + lambda * Eq. (6)."""
        device = self.topology.device
        z, eps, gauss = (x.to(device, non_blocking=True) for x in (batch.x_BCHW, batch.noise_BCHW, batch.gauss_B))
        engine, null_label = self.engine, self.config.model.num_classes
        ctx = RoutingContext.build(
            batch.label_B, null_label, device, engine.all_reduce, engine.all_gather, row_B=batch.rows
        )
        output, losses = self.objective.loss(lambda x, t: self.engine(x, t, ctx), z, eps, gauss)
        total, aux = losses["diffusion"], losses | output.aux
        for name, weight in self.aux_weights.items():
            total = total + weight * aux[name]
        return output, [total, losses["diffusion"], *(aux[name] for name in self.aux_weights)]

    def _mean_over_ranks(self, totals: Tensor) -> list[float]:
        """Means over ranks, checked before the weights are touched. Raises TrainingStopped on every rank alike."""
        mine = totals.clone()
        means = (sum_over_ranks(totals) / self.topology.world).tolist()
        if not all(map(math.isfinite, means)):
            self._name_culprit(gather_objects(mine.tolist(), self.topology))
        return means

    def _name_culprit(self, values_by_rank: list[list[float]]) -> NoReturn:
        """The diffusion loss first: a contrastive loss of global scope is bad on every rank if it is on one."""
        order = [*range(1, len(self.terms)), 0]
        bad = ((r, i) for i in order for r, values in enumerate(values_by_rank) if not math.isfinite(values[i]))
        rank, i = next(bad, (0, 0))
        value = f"{self.terms[i]} is {values_by_rank[rank][i]}"
        raise TrainingStopped(f"step {self.step + 1}, rank {rank}: {value}; the last checkpoint is unharmed")

    # --------------------------------------------------------------------------------------------------- reporting

    def _part(self, name: str) -> AbstractContextManager[None]:
        return self.meter.part(name) if self.meter else nullcontext()

    def _measured(self) -> dict[str, float]:
        """Collective: a step's seconds by part, the mean over ranks, and its bytes by kind, the sum over ranks."""
        if self.meter is None:
            return {}
        steps = max(1, self.throughput.images // self.config.train.global_batch_size)
        values = sum_over_ranks(self.meter.report(steps).to(self.topology.device)).tolist()
        seconds = {f"seconds/{name}": value / self.topology.world for name, value in zip(PARTS, values, strict=False)}
        return seconds | {f"bytes/{name}": value for name, value in zip(KINDS, values[len(PARTS) :], strict=True)}

    def _report(self, record: dict[str, Any]) -> None:
        """Collective: sum the expert loads over ranks; rank 0 writes the record."""
        measured = self._measured()
        load_LE = sum_over_ranks(record.pop("load").clone())
        if self.log:
            rate = self.throughput.rate()
            ratio, dead = expert_load(load_LE.cpu())
            device = self.topology.device
            peak = accounting.device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            mfu = rate / self.topology.world * self.image_flops / peak if peak else None
            self.log.write({
                "step": self.step, **{k: record[k] for k in self.terms}, "grad_norm": record["grad_norm"],
                "images_per_s": rate, "mfu": mfu, "memory_gib": memory_gib(device), "load_max_over_mean": ratio,
                "dead_experts": dead, "seconds_per_step": self.config.train.global_batch_size / rate, **measured,
            })  # fmt: skip
        self.throughput.reset()
        if self.meter:
            self.meter.reset()

    def _draw_samples(self) -> None:
        """Rank 0 draws a grid with the EMA weights, fixed noise: samples/grid.png, and by step."""
        start = time.perf_counter()
        weights = ema_state_dict(self.engine, self._fixed(), self.ranks)
        if self.log:
            model = build(self.config)
            model.load_state_dict(weights, assign=True)
            try:
                image = draw_grid(model.to(self.topology.device).eval(), self.config, self.topology.device)
                self._keep_grid(image)
            except (ConfigError, OSError) as error:  # a picture is no reason to lose a run
                self._say(f"  no sample grid: {error}")
        barrier(self.topology)
        self._say(f"  sample grid: {time.perf_counter() - start:.1f} s")

    def _keep_grid(self, image: Image.Image) -> None:
        target = self.run_folder / "samples"
        target.mkdir(exist_ok=True)
        image.save(target / f"grid_{self.step:08d}.png")
        image.save(target / "grid.png")
        if self.log:
            self.log.image("samples", image, self.step)

    def _paused(self, work: Callable[..., None], *args: Any) -> None:
        """Do it; its time does not count as time of training."""
        start = time.perf_counter()
        work(*args)
        self.throughput.pause(time.perf_counter() - start)
        if self.meter:
            self.meter.skip()

    def _banner(self) -> str:
        t, cfg = self.topology, self.config.train
        where = f"resuming at step {self.step}" if self.step else "starting"
        return (
            f"{self.config.name}: {where} of {cfg.steps}; {self.total_parameters / 1e6:.1f} M parameters, "
            f"{len(self.dataset)} images; {t.world} x {t.device.type}, ep {t.ep}, ZeRO-{self.engine.stage}, "
            f"{cfg.precision}, global batch {cfg.global_batch_size}; run folder {self.run_folder}"
        )

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, flush=True)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.stop_since is None:
            self.stop_since = now  # every rank learns of it with the losses of the step
        elif now - self.stop_since > REPEAT_SECONDS:
            sys.exit(128 + number)

    def close(self) -> None:
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.close()
