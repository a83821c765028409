"""DeepSpeed's engine behind the five verbs the trainer needs: forward, backward, step, read and write of state.

State is read and written by full tensors under their single-device names, whatever the ZeRO stage and the
expert-parallel degree: that is what makes checkpoints independent of the topology.

DeepSpeed 0.19.8 facts worked around here:
  * stage 0 clips with a norm that averages expert gradients over ranks (#8475): clipping is done here at stage 0
  * stages 1 and 2 link optimizer-state fragments after the first parameter group has stepped, so the experts' group
    stays unlinked: `relink`
  * stages 1 and 2 wait for the device before each reduction of gradients to their owner: `_reduce_beside_work`
  * each start imports Muon, and its decorator the whole of torch's compiler, seconds on every rank: `_import_muon`
  * stages 1 and 2 copy gradients to float64 for their norm: `_norm_in_one_pass`
  * stages 1 and 2 copy gradients into fp32 buckets, and would take them in bf16: `_cast_by_buckets`
  * on one rank gradients are flattened and copied as if there were others: `_leave_out_copies`
  * stage 3 sets full tensors without regard to the padding of the last partition: `write` sets the local part
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import compiler
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from promoe_ds.config.schema import Config
from promoe_ds.models.compiled import wanted
from promoe_ds.models.dit import DiT, DiTOutput
from promoe_ds.moe.weight_casts import cast_once, let_go, renew
from promoe_ds.parallel import one_pass
from promoe_ds.parallel.adamw_ema import AdamWithEMA
from promoe_ds.parallel.collectives import sum_in_place
from promoe_ds.parallel.ds_config import ResolvedDS
from promoe_ds.parallel.expert_parallel import is_sharded, local_part
from promoe_ds.parallel.topology import Topology

WEIGHT = "fp32"
"""name of the master weights among the states; the others are those of the optimizer"""
BUCKET = 2**24
"""values of full tensors that are read in one collective, 64 MiB; a larger tensor has its own"""


class Engine:
    """A model in training.

    Args:
        model: materialised, parallelised, fp32.
        config: the run's configuration.
        ds: the resolved DeepSpeed configuration.
        topology: where this process stands; the process group must be connected.
    """

    def __init__(self, model: DiT, config: Config, ds: ResolvedDS, topology: Topology):
        self.config, self.stage, self.topology = config, ds.stage, topology
        params: Any = {"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}
        param_groups = split_params_into_different_moe_groups_for_optimizer(params) if topology.ep > 1 else [params]
        update = one_pass.compiled() if _compiles_update(config, ds, topology) else None
        self.adam = AdamWithEMA(param_groups, config.optimizer, update)
        _import_muon()
        self.engine: Any = deepspeed.initialize(model=model, optimizer=self.adam, config=ds.json)[0]
        if self.stage in (1, 2):
            _reduce_beside_work(self.engine.optimizer)
            _norm_in_one_pass(self.engine.optimizer)
        if topology.world == 1:
            _leave_out_copies(self.engine, self.stage)
        if update:
            self.adam.clip = self._clip_factor
            self.engine.optimizer.clip_grad = 0.0  # it is done in the pass, not before it
        self.params = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        self.forwards = 0
        """since the last backward pass"""
        at_once = self.stage == 2 or (self.stage == 1 and self.engine.gradient_accumulation_steps() == 1)
        self.cast_later = _cast_by_buckets(self.engine.optimizer, self.params.values()) if at_once else []
        """parameters that take gradients as they come, because each goes into a bucket at once"""
        self._cast_gradients(False)

    def _cast_gradients(self, first: bool) -> None:
        for p in self.cast_later:
            p.grad_dtype = torch.float32 if first else None

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, row_B: Tensor) -> DiTOutput:
        if self.stage == 2 or (self.stage == 1 and self.engine.is_gradient_accumulation_boundary()):
            renew()  # gradients are reduced while this micro-batch runs backward
        self.forwards += 1
        return self.engine(x_BCHW, t_B, y_B, row_B)

    def accumulation(self) -> AbstractContextManager[None]:
        """Around the micro-batches of a step, the update left out: weights are cast once for all of them.

        Not at stage 3, which lets go of whole weights between their uses.
        """
        return cast_once() if self.stage < 3 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this micro-batch; reduce them over the ranks at the last one."""
        if self.forwards > 1:  # those of one parameter add up before they are in a bucket
            self._cast_gradients(True)
        if self.config.train.activation_checkpointing == "none" and self.engine.is_gradient_accumulation_boundary():
            let_go()
        self.engine.backward(loss)
        if self.forwards > 1:
            self._cast_gradients(False)
        self.forwards = 0
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # advances DeepSpeed's micro-step counter only

    def clip(self) -> Tensor | None:
        """At stage 0, clip and return the global gradient norm before clipping, on the device; call `step` with it.

        None at stages 1 to 3, where DeepSpeed does this within `step`.
        """
        if self.stage:
            return None
        dense = [p.grad for p in self.params.values() if not is_sharded(p) and p.grad is not None]
        local = [p.grad for p in self.params.values() if is_sharded(p) and p.grad is not None]
        square = _square_sum(dense)
        if local:  # every rank of the expert-parallel group holds other experts
            square = square + sum_in_place(_square_sum(local), self._ep_group(), "scalars")
        norm, limit = square.sqrt(), self.config.optimizer.clip_grad_norm
        if limit > 0:
            torch._foreach_mul_(dense + local, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, norm: float | None, lr: float) -> float:
        """Update after the last micro-batch; returns the global gradient norm before clipping.

        If the norm is not finite there is no update, on any rank: DeepSpeed refuses it at stages 1 to 3.

        Args:
            norm: what `clip` returned, read by the caller.
            lr: the learning rate of this step.
        """
        if norm is not None and not math.isfinite(norm):
            self.drop()
            return norm
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.engine.step()
        return norm if norm is not None else float(self.engine.get_global_grad_norm())

    def drop(self) -> None:
        """Forget the gradients of the last micro-batches without an update."""
        self.adam.refuse = True
        self.engine.step()
        self.adam.refuse = False

    def skip(self) -> None:
        """Count a step without an update: the bias correction of Adam knows the number of steps, as after a resume."""
        partitions = self._partitions()
        self.adam.start(partitions)
        for p in partitions:
            self.adam.state[p]["step"] += 1

    def _clip_factor(self) -> float:
        """What DeepSpeed would multiply the gradients by, of the norm that it has computed."""
        limit, norm = self.config.optimizer.clip_grad_norm, float(self.engine.optimizer._global_grad_norm)
        if norm < 0:  # DeepSpeed's sign that it is not finite
            norm = math.inf
        return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0

    def _ep_group(self) -> Any:
        return groups._get_expert_parallel_group(f"ep_size_{self.topology.ep}")

    def read(self, state: str, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and full tensors of a state of the parameters ("fp32", "exp_avg", "exp_avg_sq", "ema" ...), fp32.

        Collective, and to be read to the end by every rank alike. Many small tensors travel together, because a
        collective of a small one is mostly waiting. Sharded experts are gathered over the expert-parallel group: first
        dimension E.

        Args:
            names: of the parameters; all of them if not given. They come in another order.
        """
        names = list(self.params if names is None else names)
        if self.stage == 3:
            for name in names:
                yield name, self._gathered([name], [self._full_at_stage_3(name, state)])[0]
            return
        for bucket in _buckets({name: self.params[name] for name in names}, self.topology.ep):
            yield from zip(bucket, self._full(bucket, state), strict=True)

    @torch.no_grad()
    def _full(self, names: list[str], state: str) -> list[Tensor]:
        """At stages 0 to 2, of parameters that are all sharded over the expert-parallel group, or all not."""
        params = [self.params[name] for name in names]
        if self.stage == 0:
            mine = [p.detach() if state == WEIGHT else self.adam.state[p][state] for p in params]
            return self._gathered(names, mine)
        flat = torch.zeros(sum(p.numel() for p in params), device=self.engine.device)
        pieces = flat.split([p.numel() for p in params])
        for p, piece in zip(params, pieces, strict=True):
            if p._hp_mapping is not None:  # this rank has a fragment of it
                address = p._hp_mapping.lp_fragment_address
                fragment = p._hp_mapping.get_hp_fragment(None if state == WEIGHT else state)
                piece.narrow(0, address.start, address.numel).copy_(fragment)
        dist.all_reduce(flat, group=params[0]._dp_group)
        return self._gathered(names, [piece.view(p.shape) for p, piece in zip(params, pieces, strict=True)])

    def _full_at_stage_3(self, name: str, state: str) -> Tensor:
        p = self.params[name]
        full = safe_get_full_fp32_param(p) if state == WEIGHT else safe_get_full_optimizer_state(p, state)
        assert full is not None, f"{name}: no {state}"
        return full

    @torch.no_grad()
    def _gathered(self, names: list[str], mine: list[Tensor]) -> list[Tensor]:
        """`mine`, or all experts if these are this rank's."""
        if not is_sharded(self.params[names[0]]):
            return mine
        flat = torch.cat([x.flatten() for x in mine])
        parts = [torch.empty_like(flat) for _ in range(self.topology.ep)]
        dist.all_gather(parts, flat, group=self._ep_group())
        pieces = zip(*(part.split([x.numel() for x in mine]) for part in parts), strict=True)
        return [torch.cat([p.view(x.shape) for p in piece]) for x, piece in zip(mine, pieces, strict=True)]

    def mean_gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Adam's first moments of parameters without their bias, fp32: the means of their clipped gradients over about
        1 / (1 - beta1) steps, alike at every topology and ZeRO stage; after a step and `relink`; collective."""
        steps = float(self.adam.state[self._partitions()[0]]["step"])
        return {n: x / (1 - self.config.optimizer.beta1**steps) for n, x in self.read("exp_avg", names)}

    def whole(self, x: Tensor) -> Tensor:
        """All values of a parameter or buffer that is not an expert's; collective at stage 3."""
        full = safe_get_full_fp32_param(x) if self.stage == 3 and isinstance(x, torch.nn.Parameter) else x
        assert full is not None
        return full.detach()

    def write(self, name: str, state: str, full: Tensor) -> None:
        """Set a parameter's state from its full tensor; local."""
        p = self.params[name]
        full = local_part(p, full, self.topology).to(self.engine.device)
        if self.stage == 3:
            size = p.ds_tensor.numel()  # type: ignore[attr-defined]
            rank = self.engine.optimizer._get_param_partition_rank(p)
            padded = torch.nn.functional.pad(full.flatten(), (0, max(0, size * (rank + 1) - full.numel())))
            part = padded[size * rank : size * (rank + 1)]
            if state == WEIGHT:
                safe_set_local_fp32_param(p, part)
            else:
                safe_set_local_optimizer_state(p, part, state)
        elif self.stage == 0:
            (p.data if state == WEIGHT else self.adam.state[p][state]).copy_(full)
        elif state == WEIGHT:
            safe_set_full_fp32_param(p, full)
        else:
            safe_set_full_optimizer_state(p, full, state)

    def allocate(self, step: int) -> None:
        """Make empty optimizer state as after `step` updates; `write` fills it."""
        self.adam.allocate(self._partitions(), step)
        self.engine.global_steps = step
        self.relink()

    def _partitions(self) -> list[Any]:
        """The tensors that the optimizer updates: parameters, or this rank's flat partitions of them."""
        if self.stage == 0:
            return list(self.params.values())
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def relink(self) -> None:
        """Connect parameters with their slices of the optimizer state; before reading or writing it."""
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _import_muon() -> None:
    """The modules that DeepSpeed asks whether our optimizer is a Muon, without compiling what they decorate."""
    real, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = real


def _buckets(params: dict[str, Any], ep: int) -> Iterator[list[str]]:
    """Names in groups of at most `BUCKET` values; sharded experts apart, whose data-parallel group is another."""
    for sharded in (False, True):
        bucket, values = [], 0
        for name, p in params.items():
            if is_sharded(p) != sharded:
                continue
            more = p.numel() * (ep if sharded else 1)
            if bucket and values + more > BUCKET:
                yield bucket
                bucket, values = [], 0
            bucket.append(name)
            values += more
        if bucket:
            yield bucket


def _reduce_beside_work(zero: Any) -> None:
    """Let reductions of gradients to their owner run beside the backward pass, as DeepSpeed's all-reduces do.

    With `overlap_comm` its `allreduce_and_copy` first waits for the device, so that gradients of earlier buckets may be
    freed. Gradients in contiguous buckets live in the buckets. Its caller has made the reduction stream current, which
    it takes without `overlap_comm`.
    """
    reduce, overlap = zero.allreduce_and_copy, zero.overlap_comm

    def without_waiting(*args: Any, **kwargs: Any) -> None:
        zero.overlap_comm = False
        try:
            reduce(*args, **kwargs)
        finally:
            zero.overlap_comm = overlap

    if zero.contiguous_gradients:
        zero.allreduce_and_copy = without_waiting


def _leave_out_copies(engine: Any, stage: int) -> None:
    """One rank has nobody to sum gradients with, but DeepSpeed flattens them, divides by 1, and copies them back."""
    if stage == 0:
        # Called for what it does beside: parameters without a gradient get zeros.
        engine.buffered_allreduce_fallback = lambda *_, **__: engine._get_gradients_for_reduction()
        return
    zero = engine.optimizer
    # fp32 gradients of bf16 weights are added up where they are reduced.
    if stage < 3 and not any(map(zero._use_compact_grad_partition_buffer, range(len(zero.bit16_groups)))):
        zero.average_tensor = lambda *_: None
        zero.overlap_comm = False  # else buckets are copied on a stream of their own, for which that method waits


def _norm_in_one_pass(zero: Any) -> None:
    """The norm of stages 1 and 2, to the bit: DeepSpeed first makes a float64 copy of each gradient, 16 bytes written
    and read per parameter."""

    def norm(gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        norms = [torch.linalg.vector_norm(g, ord=norm_type, dtype=torch.float64) for g in real[: len(params)]]
        total = torch.stack(norms).pow(norm_type).sum().float() if norms else torch.zeros((), device=zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        total = total.pow(1 / norm_type)
        mask_nan_or_inf_with_val_inplace(total, device=zero.device)
        return total

    zero.get_grad_norm_direct = norm


def _cast_by_buckets(zero: Any, params: Iterable[Any]) -> list[Any]:
    """The parameters whose gradients are copied into a bucket of fp32, which casts them: a cast before that would write
    and read them once more. One that is larger than a bucket is reduced where it lies."""
    return [
        p
        for p in params
        if zero.contiguous_gradients and p.dtype == torch.float32 and p.numel() <= zero.reduce_bucket_size
    ]


def _compiles_update(config: Config, ds: ResolvedDS, topology: Topology) -> bool:
    """Where it was measured to pay: in host memory, for the flat partitions of stages 1 and 2."""
    here = ds.stage in (1, 2) and (topology.device.type == "cpu" or ds.offload)
    return here and wanted(config, topology.device.type, ds.stage)


def _square_sum(tensors: list[Any]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
