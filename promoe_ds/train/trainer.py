"""The training loop: read `Trainer.run` from top to bottom.

One optimizer step is a pure function of (state, seed, step): data, noise, timesteps, label drops and flips are drawn
for the global batch and sliced by rank, so the loss curve does not depend on the topology, and a resumed run repeats
exactly what the interrupted one would have done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.checkpoint import layout, resume
from promoe_ds.checkpoint.init_from import InitialWeights
from promoe_ds.checkpoint.save import Saver, ema_state_dict
from promoe_ds.config.decode import dump
from promoe_ds.config.errors import ConfigError
from promoe_ds.config.schedule import learning_rate
from promoe_ds.config.schema import Config
from promoe_ds.costs import flops
from promoe_ds.data import build_dataset, fingerprint, notes
from promoe_ds.data.batch import Batch
from promoe_ds.data.batches import BatchStream, item_path
from promoe_ds.diffusion.objective import make_objective
from promoe_ds.models.compiled import check_compiler, compile_model, untested_torch, wanted
from promoe_ds.models.dit import DiTOutput
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.experts import check_backend
from promoe_ds.moe.router import ROUTERS, Router
from promoe_ds.parallel.ds_config import ResolvedDS
from promoe_ds.parallel.engine import Engine
from promoe_ds.parallel.expert_parallel import local_part, parallelize
from promoe_ds.parallel.meter import Meter
from promoe_ds.parallel.topology import Topology, connect, sum_over_ranks
from promoe_ds.train import nonfinite
from promoe_ds.train.grids import GridFailed, keep_grid
from promoe_ds.train.loss import total_loss
from promoe_ds.train.metrics import ExpertWatch, MetricsLog, Throughput, expert_load, memory_gib
from promoe_ds.train.nonfinite import RankFailed, StoppedEarly, TrainingStopped
from promoe_ds.train.profiling import StepProfiler
from promoe_ds.train.scores import Judge, Scores
from promoe_ds.utils import signals
from promoe_ds.utils.command_line import DONE, STOPPED
from promoe_ds.utils.files import write_text
from promoe_ds.utils.outputs import CODEC, CONFIG
from promoe_ds.utils.pictures import load_map


class Trainer:
    """A run on one rank: model, engine, data and log, at some step."""

    def __init__(self, config: Config, ds: ResolvedDS, run: Path, topology: Topology, judge: Judge | None = None):
        self.config, self.run_folder, self.topology, self.judge = config, run, topology, judge
        checkpoint, data = self._open_run()
        self.engine = self._build_engine(ds, checkpoint)
        facts = {"world": topology.world, "ep": topology.ep, "stage": ds.stage, "torch": torch.__version__,
                 "data": data}  # fmt: skip
        self.saver = Saver(run, self.engine, config, topology, facts, self._say)
        self.objective = make_objective(config.diffusion, topology.device)
        router_weights = ROUTERS[config.moe.router.name].aux_loss_weights(config.moe.router) if config.moe else {}
        self.aux_loss_weights = self.objective.aux_loss_weights | router_weights
        self.experts = ExpertWatch(self.model)
        self.terms = ["loss", "loss/diffusion", *(f"loss/{name}" for name in self.aux_loss_weights)]
        self.log = self._open_log(ds) if topology.rank == 0 else None
        self.throughput = Throughput()
        self.meter = Meter(self.model, topology.device) if config.train.measure else None
        self.profiler = StepProfiler(None if topology.rank else config.train.profile, run, topology.device, self._say)
        self.skips_in_a_row = 0
        self.image_flops = flops.train_flops(config, config.diffusion.label_drop)

    def _open_run(self) -> tuple[Path | None, str]:
        """Join the ranks, check and claim the run; returns the checkpoint to resume from, if any, and its data."""
        config, run, device = self.config, self.run_folder, self.topology.device
        self._connect()
        data = fingerprint(self.dataset)
        for note in notes(self.dataset):
            self._say(f"data.path={config.data.path}: {note}")
        check_backend(config, device.type)
        check_compiler(config, device.type)
        self.lock = layout.claim(run) if self.topology.rank == 0 else None
        if self.lock:
            signals.remove_marker(run)
        self._stop_early(layout.step_of(found[-1]) if (found := layout.candidates(run)) else 0)
        checkpoint = layout.find_whole(run, self.topology)
        if checkpoint:
            resume.check_same_run(layout.manifest(checkpoint)["config"], config, checkpoint)
            resume.check_same_data(checkpoint, data)
            self.started = None
        elif config.train.init and not self.started:  # this rank saw checkpoints where the first rank finds none
            self.started = InitialWeights(config)
        self.step = resume.check_history(run, checkpoint, config)
        self.changed_rates = resume.changed_rates(checkpoint, config)
        self.renewed = self.step + 1 if self.changed_rates else 0
        if self.scores:
            self.scores.prepare()
        return checkpoint, data

    def _connect(self) -> None:
        """Join the other ranks, then raise what was wrong before: a rank that leaves alone would be waited for."""
        problem = None
        try:
            self.dataset = build_dataset(self.config)
            resume.check_run(self.run_folder, self.config)
            new = self.config.train.init and not layout.candidates(self.run_folder)
            self.started = InitialWeights(self.config) if new else None
            scored = self.config, self.topology, self.dataset.codec, self.judge
            self.scores = Scores(*scored) if self.config.train.score_every else None
        except ConfigError as error:
            problem = error
        if problem is None or self.topology.world > 1:
            connect(self.topology, self.config.parallel.timeout_minutes)
        if problem:
            raise problem

    def _build_engine(self, ds: ResolvedDS, checkpoint: Path | None) -> Engine:
        """Collective: the model, its weights (of the checkpoint, of `train.init`, or drawn), and DeepSpeed."""
        topology = self.topology
        torch.backends.cudnn.allow_tf32 = self.config.train.precision != "fp32"
        model = parallelize(build(self.config), topology)
        materialize(model, self.config.train.seed, topology.device)
        self.model, self.routers = model, [m for m in model.modules() if isinstance(m, Router)]
        reader = resume.Reader(checkpoint) if checkpoint else None
        if source := self.started or reader:
            resume.load_weights(source, model, lambda p, full: local_part(p, full, topology))
        self.positions = {n: p.detach().cpu() for n, p in model.named_parameters() if not p.requires_grad}
        if wanted(self.config, topology.device.type, ds.stage):
            compile_model(model, whole=not self.config.train.measure)
            self._say("train.compile: the first steps take a minute or more")
            if warning := untested_torch():
                self._say(warning)
        engine = Engine(model, self.config, ds, topology)
        if reader:
            resume.restore(reader, engine, self.step, quiet=topology.rank > 0)
        return engine

    def _open_log(self, ds: ResolvedDS) -> MetricsLog:
        """Everything is checked: from here on the run folder is written."""
        run = self.run_folder
        try:
            texts = {CONFIG: dump(self.config), "ds_config.json": json.dumps(ds.json, indent=1)}
            if self.dataset.codec is not None:  # what must decode the samples
                texts[CODEC] = json.dumps(self.dataset.codec, indent=1)
            texts |= {"init.json": json.dumps(self.started.record(), indent=1)} if self.started else {}
            for name, text in texts.items():
                write_text(run / name, text.rstrip() + "\n")
            return MetricsLog(run, self.step, self.config.train.steps)
        except OSError as error:
            raise RankFailed(f"--run={run}: cannot be written ({error}); choose another folder") from error
        except ConfigError as error:  # a log that rank 0 alone cannot read
            raise RankFailed(str(error)) from error

    def _fixed(self) -> dict[str, Tensor]:
        """What the model holds besides trained parameters: the position table, and the buffers of routers as of now."""
        return self.positions | dict(self.model.named_buffers())

    def run(self) -> int:
        """Train from the current step to `train.steps`; returns the exit code."""
        cfg = self.config.train
        self._say(self._banner())
        self._stop_early(self.step)
        if self.scores and self.scores.owed(self.run_folder, self.step) and not self._paused(self._score, self.scores):
            return self._leave_marker(self.step)
        with BatchStream(self.config, self.dataset, self.topology, self.step) as stream:
            while self.step < cfg.steps:
                try:
                    self.profiler.before(self.step + 1)
                    record = self._train_step(self._next(stream))
                except TrainingStopped:  # on every rank alike: a checkpoint under way is completed first
                    self.saver.finish(tolerant=True)
                    raise
                if self.profiler.active:
                    self._paused(self.profiler.after, self.step)
                if self.saver.job:
                    self._paused(self.saver.poll)
                if self._logged(self.step) or record["skipped"]:
                    self._report(record)
                last = self.step == cfg.steps or record["stop"]
                if last or self.step % cfg.checkpoint_every == 0:
                    self._paused(self.saver.save, self.step, self._fixed(), last)
                if cfg.sample_every and self.step % cfg.sample_every == 0 and not last:
                    self._paused(self._draw_samples)
                if record["stop"] and self.step < cfg.steps:
                    return self._leave_marker(self.step)
                if self.scores and self.step % cfg.score_every == 0 and not self._paused(self._score, self.scores):
                    if not self.topology.gather(layout.folder(self.run_folder, self.step).exists())[0]:
                        self.saver.save(self.step, self._fixed(), True)
                    return self._leave_marker(self.step)
        self._paused(self._draw_samples)
        self._say(f"done: {self.step} steps; weights in {layout.folder(self.run_folder, self.step) / layout.EMA}")
        return DONE

    def _logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.config.train.steps, self.renewed)

    def _stop_early(self, step: int) -> None:
        """Collective: whether a rank was told to stop before the first step. Nothing is lost, so nothing is saved."""
        asked = torch.tensor(float(signals.requested() is not None), device=self.topology.device)
        if sum_over_ranks(asked) > 0:
            self._leave_marker(step)
            raise StoppedEarly

    def _leave_marker(self, step: int) -> int:
        """The state of `step` is on disk, whole: tell people and batch scripts; returns the exit code."""
        if self.lock:
            signals.write_marker(self.run_folder, step)
        self._say(f"stopped by a signal at step {step}; the same command continues")
        return STOPPED

    def _next(self, stream: BatchStream) -> list[Batch]:
        try:
            return next(stream)
        except ConfigError as error:
            raise RankFailed(f"rank {self.topology.rank}: {error}") from error

    def _train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step; returns the losses, gradient norm, expert load and whether to stop."""
        self.experts.start()
        totals, tokens_per_expert_LE = self._accumulate(batches, self._logged(self.step + 1))
        mine = totals.clone()
        totals[-1] = float(signals.requested() is not None)  # every rank learns of it with the losses of the step
        with self._part("optimizer"):
            clipped = self.engine.clip()
        sums, load_LE = self._summed(totals, tokens_per_expert_LE)
        if clipped is None:
            (*losses, stop), read = sums.tolist(), None
        else:  # stage 0: the norm comes with the losses, in the one host read of the step
            *losses, stop, read = torch.cat([sums, clipped.view(1)]).tolist()
        record: dict[str, Any] = dict(zip(self.terms, losses, strict=True))
        record |= {"load": tokens_per_expert_LE, "stop": stop > 0, "skipped": None}
        norm = math.nan
        if all(map(math.isfinite, losses)):
            with self._part("optimizer"):
                norm = self.engine.step(read, learning_rate(self.config, self.step + 1))
        else:
            self.engine.drop()
        self.step += 1
        if math.isfinite(norm):
            self.skips_in_a_row = 0
            for router, load_E in zip(self.routers, load_LE, strict=True):
                router.after_step(load_E)
        else:
            record["skipped"] = self._not_finite(batches, mine[:-1].tolist(), norm)
        self.throughput.images += self.config.train.global_batch_size
        return record | {"grad_norm": norm}

    def _summed(self, totals: Tensor, tokens_per_expert_LE: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """One collective -> means over ranks of the losses; the load of each router over the ranks, where one asks."""
        if not any(router.wants_load for router in self.routers):
            return sum_over_ranks(totals) / self.topology.world, [None] * len(self.routers)
        load = tokens_per_expert_LE.flatten().to(totals.dtype)  # exact: fewer than 2^24 tokens
        both = sum_over_ranks(torch.cat([totals, load]))
        return both[: len(totals)] / self.topology.world, both[len(totals) :].view_as(tokens_per_expert_LE).unbind()

    def _accumulate(self, batches: list[Batch], logged: bool = False) -> tuple[Tensor, Tensor]:
        """Forwards and backwards of a step -> (this rank's mean losses and one place more, tokens per expert)."""
        totals = torch.zeros(len(self.terms) + 1, device=self.topology.device)
        loads = []
        with self.engine.accumulation():
            for batch in batches:
                with self._part("forward"):
                    output, terms = self._forward(batch)
                with self._part("backward"):
                    self.engine.backward(terms[0])
                totals[:-1] += torch.stack(terms).detach() / len(batches)
                if logged:
                    self.experts.see(output)
                loads.append(output.tokens_per_expert_LE)
        return totals, sum(loads[1:], loads[0])

    def _not_finite(self, batches: list[Batch], losses: list[float], norm: float) -> str:
        """No rank has updated its weights. Find the place; returns what to log.

        Raises:
            TrainingStopped: unless `train.on_nonfinite` is skip; on every rank alike.
        """
        with nonfinite.Probe(self.model) as probe:
            probe.data(
                (batch.x_BCHW for batch in batches),
                lambda j, b: item_path(self.config, self.dataset, self.step - 1, int(batches[j].rows[b])),
            )
            self._accumulate(batches)
        self.engine.drop()
        for router in self.routers:
            router.drop_step()
        answers = self.topology.gather((losses, probe.findings()))
        what = nonfinite.culprit(self.terms, [values for values, _ in answers])
        text = f"{what or f'the gradient norm is {norm}'}; {nonfinite.place([found for _, found in answers])}"
        text = f"step {self.step}{', ' if what else ': '}{text}"
        self.skips_in_a_row += 1
        saved = self.saver.job or layout.candidates(self.run_folder)
        fallback = "the last checkpoint is unharmed" if saved else "there is no checkpoint yet"
        if self.config.train.on_nonfinite == "stop":
            raise TrainingStopped(f"{text}; {fallback}")
        if self.skips_in_a_row >= nonfinite.SKIPS_IN_A_ROW:
            raise TrainingStopped(f"{text}; {self.skips_in_a_row} steps in a row; {fallback}")
        self.engine.skip()
        return text

    def _forward(self, batch: Batch) -> tuple[DiTOutput, list[Tensor]]:
        """-> model output and `total_loss`."""
        device = self.topology.device
        z, eps, gauss = (x.to(device, non_blocking=True) for x in (batch.x_BCHW, batch.noise_BCHW, batch.gauss_B))
        output, losses = self.objective.loss(lambda x, t: self.engine(x, t, batch.label_B, batch.rows), z, eps, gauss)
        return output, total_loss(losses, output, self.aux_loss_weights)

    def _part(self, name: str) -> AbstractContextManager[None]:
        return self.meter.part(name) if self.meter else nullcontext()

    def _measured(self) -> dict[str, float]:
        """Collective: a step's seconds by part, the mean over ranks, and its bytes by kind, the sum over ranks."""
        if self.meter is None:
            return {}
        steps = max(1, self.throughput.images // self.config.train.global_batch_size)
        return self.meter.report(steps, sum_over_ranks, self.topology.world)

    def _report(self, record: dict[str, Any]) -> None:
        """Collective: sum the expert loads over ranks; rank 0 writes the record."""
        measured = self._measured()
        tokens_per_expert_LE = sum_over_ranks(record.pop("load").clone())
        self.engine.relink()
        whole, gradients = self.engine.whole, self.engine.mean_gradients
        layers = self.experts.report(tokens_per_expert_LE, sum_over_ranks, whole, gradients)
        if self.log:
            rate = self.throughput.rate()
            ratio, dead = expert_load(tokens_per_expert_LE.cpu())
            device = self.topology.device
            peak = flops.device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            mfu = rate / self.topology.world * self.image_flops / peak if peak else None
            self.log.write({
                "step": self.step, **{k: record[k] for k in (*self.terms, "grad_norm")},
                "lr": learning_rate(self.config, self.step),
                "images_per_s": rate, "mfu": mfu, "memory_gib": memory_gib(device), "load_max_over_mean": ratio,
                "dead_experts": dead, "seconds_per_step": self.config.train.global_batch_size / rate,
            } | measured | ({"skipped": record["skipped"]} if record["skipped"] else {})
              | ({"layers": layers} if layers else {}))  # fmt: skip
            if layers:
                self.log.image("expert_load", load_map(tokens_per_expert_LE.cpu().numpy()), self.step)
        self.throughput.reset()
        if self.meter:
            self.meter.reset()

    def _draw_samples(self) -> None:
        """Rank 0 draws a grid with the EMA weights, fixed noise: samples/grid.png, and by step."""
        start = time.perf_counter()
        weights = ema_state_dict(self.engine, self._fixed(), self.topology)
        if self.log:
            try:
                target = self.run_folder / "samples"
                image = keep_grid(target, weights, self.config, self.step, self.topology.device, self.dataset.codec)
                self.log.image("samples", image, self.step)
                self._say(f"  sample grid: {time.perf_counter() - start:.1f} s")
            except GridFailed as error:
                self._say(f"  no sample grid: {error}")
        self.topology.barrier()

    def _score(self, scores: Scores) -> bool:
        """Collective: draw with the EMA on every rank, score, log; False if a rank was told to stop meanwhile."""
        self.saver.finish()  # a long pause is not to cost the checkpoint before it
        weights = ema_state_dict(self.engine, self._fixed(), self.topology, everywhere=True)
        return scores.log(weights, self.step, self.log)

    def _paused(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do it; its time does not count as time of training."""
        start = time.perf_counter()
        done = work(*args)
        self.throughput.pause(time.perf_counter() - start)
        if self.meter:
            self.meter.skip()
        return done

    def _banner(self) -> str:
        t, cfg = self.topology, self.config.train
        fresh = f"starting from {cfg.init}" if cfg.init else "starting"
        where = f"resuming at step {self.step}" if self.step else fresh
        rates = "".join(f", {change}" for change in self.changed_rates)
        parameters = flops.count_parameters(self.config).total
        return (
            f"{self.config.name}: {where} of {cfg.steps}{rates}; {parameters / 1e6:.1f} M parameters, "
            f"{len(self.dataset)} images; {t.world} x {t.device.type}, ep {t.ep}, ZeRO-{self.engine.stage}, "
            f"{cfg.precision}, global batch {cfg.global_batch_size}; run folder {self.run_folder}"
            f"{self.started.summary() if self.started else ''}"
        )

    def _say(self, text: str) -> None:
        if self.topology.rank == 0:
            print(text, flush=True)

    def close(self) -> None:
        self.profiler.close(self.step)
        for file in (self.log, self.lock):
            if file:
                file.close()
