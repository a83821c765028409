"""Run by test_expert_parallel.py under torchrun: checks of one expert-parallel MoE layer, one result line a case."""

from __future__ import annotations

import json
import sys
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from promoe_ds.models.activation_checkpoint import checkpointed
from promoe_ds.models.dit import DiT
from promoe_ds.models.init import build, materialize
from promoe_ds.moe.conditional_routing import split_by_label
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import aux_losses_of
from promoe_ds.parallel.expert_parallel import parallelize
from promoe_ds.parallel.topology import Topology, connect, disconnect, leave
from promoe_ds.recipes.load import load_tree
from promoe_ds.utils.ranks import Ranks

D, S, NULL, ITEM = 16, 5, 10, 4
MIXES = {  # labels of each rank; 3 images a rank
    "mixed": [[1, NULL, 2], [3, 4, 5], [NULL, 6, 7], [8, 9, 0]],
    "one rank all null": [[NULL] * 3, [3, 4, 5], [1, 2, 3], [8, 9, 0]],
    "only one rank conditional": [[NULL] * 3, [1, 2, 3], [NULL] * 3, [NULL] * 3],
    "all null": [[NULL] * 3] * 4,
}


class Exchange:
    """The handle of a begun exchange; notes when it is waited for."""

    def __init__(self, work: Any, events: list[str]):
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("arrive")
        self.work.wait()


class Recorder:
    """Counts what every collective of deepspeed.comm moves, by wrapping the real functions."""

    def __init__(self, topology: Topology):
        self.rank = topology.ep_rank
        self.calls: list[tuple[str, int, int]] = []
        self.events: list[str] = []
        self.real = dist.all_to_all_single, dist.all_reduce

    def __enter__(self) -> Recorder:
        def all_to_all(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            splits = kwargs.get("input_split_sizes")
            kind = "counts" if splits is None else "rows"
            away = 0 if splits is None else sum(n for r, n in enumerate(splits) if r != self.rank)
            self.calls.append((kind, away, x.element_size() * (x.shape[1] if x.dim() == 2 else 1)))
            work = self.real[0](out, x, *args, **kwargs)
            if splits is None:
                return work
            self.events.append("leave")
            return Exchange(work, self.events)

        def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(("all_reduce", x.numel(), x.element_size()))
            return self.real[1](x, *args, **kwargs)

        dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
        return self

    def watch(self, layer: MoELayer) -> None:
        """Note when the parts of the layer work, forward and backward."""
        parts = {"shared": layer.shared[0], "unconditional": layer.unconditional[0], "routed": layer.routed.experts}
        for name, module in parts.items():
            note = lambda *_, name=name: self.events.append(name)  # noqa: E731
            module.register_forward_pre_hook(note)  # type: ignore[union-attr]
            module.register_full_backward_pre_hook(note)  # type: ignore[union-attr]

    def __exit__(self, *error: Any) -> None:
        dist.all_to_all_single, dist.all_reduce = self.real


def make(topology: Topology, top_k: int, skewed: bool) -> MoELayer:
    """A MoE layer with random weights, sharded if ep > 1; the same weights for every ep."""
    tree = {"model": {"width": D, "heads": 4, "depth": 1, "image_size": 8, "num_classes": NULL},
            "moe": {"layers": "all", "router": {"top_k": top_k}}}  # fmt: skip
    model: DiT = materialize(parallelize(build(load_tree(tree)), topology), seed=5)
    layer = model.blocks[0].mlp  # type: ignore[union-attr]
    assert isinstance(layer, MoELayer)
    if skewed:  # every token to expert 1, none elsewhere
        with torch.no_grad():
            layer.router.prototypes.zero_()[1] = 1.0  # type: ignore[index, operator, union-attr]
    if topology.ep > 1:
        layer.routed.set_deepspeed_parallelism()  # type: ignore[operator]
    return layer


def step(
    layer: MoELayer, x: Tensor, labels: list[int], contrastive: float = 1.0, mode: str = "none"
) -> tuple[Tensor, Tensor]:
    split = split_by_label(torch.tensor(labels), NULL, "cpu")
    x = x[split.order_B].requires_grad_()
    out, (terms, offsets_E, _) = checkpointed(layer, mode, x, split)
    losses = aux_losses_of(layer.router, [terms], tokens_per_expert(offsets_E)[None])  # type: ignore[arg-type]
    probe = torch.linspace(-1, 1, S * D).view(1, S, D)
    ((out * probe).sum() + contrastive * losses["routing_contrastive"].sum()).backward()
    assert x.grad is not None
    return out.detach()[split.restore_B], x.grad[split.restore_B]


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def compare(
    topology: Topology, labels: list[list[int]], top_k: int, skewed: bool, mode: str = "none"
) -> dict[str, float]:
    """Largest difference between the sharded layer on this rank's images and one device with all images."""
    world, rank = topology.world, topology.rank
    x = torch.randn(world * 3, S, D, generator=torch.Generator().manual_seed(0)) + (5.0 if skewed else 0.0)
    whole = make(Topology(), top_k, skewed)
    mine = slice(rank * 3, rank * 3 + 3)
    sharded = make(topology, top_k, skewed)
    with Recorder(topology) as record:
        record.watch(sharded)
        out, grad = step(sharded, x[mine].clone(), labels[rank], mode=mode)
    # Each rank computes the same global contrastive loss, so a sum over ranks counts it `world` times.
    expected, expected_grad = step(whole, x.clone(), sum(labels[:world], []), contrastive=world)
    worst = {"output": largest(out - expected[mine]), "input grad": largest(grad - expected_grad[mine])}
    reference = dict(whole.named_parameters())
    for name, p in sharded.named_parameters():
        assert p.grad is not None, name
        total = p.grad.clone()
        want = reference[name].grad
        if getattr(p, "allreduce", True):
            dist.all_reduce(total)
        else:  # summed over the replicas of these experts
            owners = topology.gather((topology.ep_rank, p.grad))
            total = torch.stack([grad for owner, grad in owners if owner == topology.ep_rank]).sum(0)
            want = want.chunk(topology.ep)[topology.ep_rank]  # type: ignore[union-attr]
        worst["gradients"] = max(worst.get("gradients", 0.0), largest(total - want))  # type: ignore[operator]
    return worst | traffic(topology, sharded, x[mine], labels[rank], record)


def traffic(topology: Topology, layer: MoELayer, x: Tensor, labels: list[int], record: Recorder) -> dict[str, Any]:
    """Rows this rank sent away in the four exchanges, and how many the routing says it must."""
    split = split_by_label(torch.tensor(labels), NULL, "cpu")
    routing = layer.router(x[split.order_B][: split.num_conditional].flatten(0, 1), x.shape[1], split)
    local = 12 // topology.ep
    away = int((routing.expert_N // local != topology.ep_rank).sum())
    group = topology.ep_groups()[topology.rank // topology.ep]
    everyone = topology.gather((routing.expert_N // local).tolist())
    arriving = sum(owner == topology.ep_rank for r in group if r != topology.rank for owner in everyone[r])
    rows = [call for call in record.calls if call[0] == "rows"]
    return {
        "rows sent": [n for _, n, _ in rows],
        # dispatch out, results back, gradients of results out, gradients of inputs back
        "rows needed": [away, arriving, away, arriving],
        "row bytes": sorted({size for _, _, size in rows}),
        "counts exchanges": sum(kind == "counts" for kind, *_ in record.calls),
        "events": record.events,
        "all-reduces": [n for kind, n, _ in record.calls if kind == "all_reduce"],
    }


def reductions(topology: Topology, mode: str) -> list[int]:
    """Sizes of all that is all-reduced in a forward and backward of a whole model, which has two MoE layers."""
    tree = {"model": {"width": D, "heads": 4, "depth": 3, "image_size": 8, "num_classes": NULL},
            "moe": {"layers": [0, 2], "router": {"balance_weight": 0.1}},
            "train": {"activation_checkpointing": mode}}  # fmt: skip
    model = materialize(parallelize(build(load_tree(tree)), topology), seed=5)
    for block in model.blocks:
        if topology.ep > 1 and isinstance(block.mlp, MoELayer):
            block.mlp.routed.set_deepspeed_parallelism()  # type: ignore[operator, union-attr]
    labels = torch.tensor(MIXES["one rank all null"][topology.rank])
    with Recorder(topology) as record:
        out = model(torch.randn(3, 4, 8, 8), torch.rand(3), labels)
        (out.prediction.sum() + sum(loss_L.sum() for loss_L in out.aux_losses.values())).backward()
    return [n for kind, n, _ in record.calls if kind == "all_reduce"]


def arrives_twice(topology: Topology) -> bool:
    """Whether rows can be waited for twice: their gradients would travel twice, and those of one way be lost."""
    all_to_all = make(topology, 1, skewed=False).routed.dispatcher.all_to_all  # type: ignore[union-attr]
    handle = all_to_all(torch.zeros(topology.ep, D), [1] * topology.ep, [1] * topology.ep)
    handle.wait()
    try:
        handle.wait()
    except AssertionError:
        return False
    return True


def main() -> None:
    ep = int(sys.argv[1])
    topology = Topology.of(Ranks.from_environment(), ep)
    connect(topology)
    results = {}
    for name, labels in MIXES.items():
        for top_k in (1, 3):
            results[f"{name}, top-{top_k}"] = compare(topology, labels, top_k, skewed=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["bf16 autocast"] = compare(topology, MIXES["mixed"], 1, skewed=False)
    results["selective checkpointing"] = compare(topology, MIXES["mixed"], 3, skewed=False, mode="selective")
    results["everything to one expert"] = compare(topology, MIXES["mixed"], 1, skewed=True)
    assert not arrives_twice(topology)
    reduced = {mode: reductions(topology, mode) for mode in ("none", "block", "selective")}
    everyone = topology.gather({"cases": results, "reductions": reduced})
    if topology.rank == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    disconnect()
    leave(0)


if __name__ == "__main__":
    main()
