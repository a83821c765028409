"""The peers compute what they are measured for, the counts of the README hold, and the page shows what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_peers, throughput
from benchmarks.common import load_points, save_point
from benchmarks.op_counting import count_operators, host_syncs
from promoe_ds.moe.dispatch import tokens_per_expert
from promoe_ds.moe.experts import backend_problem
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.router import aux_losses_of
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import guarded

CPU = torch.device("cpu")
SMALL = ["model.width=48", "model.heads=4", "model.image_size=8"]


def layer() -> tuple[MoELayer, torch.Tensor, Any]:
    torch.manual_seed(0)
    made = MoELayer(load_config("imagenet256_promoe_s", [*SMALL, "train.precision=fp32"]))
    throughput.draw_weights(made)
    x, split = torch.randn(4, 16, 48), throughput.split_of(4, CPU)
    return made, x[split.order_B], split


@pytest.mark.parametrize("routing", ["learned", "uniform", "skewed"])
def test_the_loop_computes_what_the_layer_computes(routing: str) -> None:
    made, x, split = layer()
    if routing != "learned":
        moe_peers.force_routing(made, routing)
    out, (terms, offsets_E, _) = made(x, split)
    loop, (losses, loop_offsets_E, _) = moe_peers.loop_layer(made, x, split)
    torch.testing.assert_close(out, loop, rtol=1e-4, atol=1e-5)
    assert torch.equal(offsets_E, loop_offsets_E)
    if routing == "learned":  # a forced choice comes after the layer's terms, and before the loop's loss
        (ours,) = aux_losses_of(made.router, [terms], tokens_per_expert(offsets_E)[None])["routing_contrastive"]  # type: ignore[arg-type]
        torch.testing.assert_close(ours, losses["routing_contrastive"], rtol=1e-4, atol=1e-5)


def test_operators_and_host_syncs_of_promoe_s() -> None:
    """At most 1.4 of Dense-DiT's operators, in evaluation and, with the contrastive loss, in training. No host sync."""
    found = {}
    for name in ("dense", "promoe"):
        model = throughput.make_model(f"{name}_s", CPU, "model.image_size=8")
        x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), throughput.labels(4)
        model(x, t, y)  # constants are made once
        with torch.profiler.profile() as profile:
            model(x, t, y)
        with torch.no_grad():
            modes = [lambda m=model, x=x, t=t, y=y, on=on: m.train(on)(x, t, y) for on in (False, True)]
            counts = [count_operators(mode) for mode in modes]
        seen = sum(event.count for event in profile.key_averages() if event.key == "aten::detach")
        assert counts[1].names["detach"] == seen, "with gradients off nothing is missed of what a training forward does"
        found[name] = counts
    for dense, ours in zip(found["dense"], found["promoe"], strict=True):
        assert ours.total <= 1.4 * dense.total and ours.syncs == 0


def test_syncs_are_counted() -> None:
    x = torch.arange(4.0)
    assert host_syncs(lambda: (x.sum().item(), x[x > 1], x.nonzero()), CPU) >= 3
    assert host_syncs(lambda: x.sum() + x[1:].max(), CPU) == 0


def test_points_resume_and_the_page_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = {"rounds": [[1.0, 2.0, 1.0], [1.0, 2.0, 2.0]]}
    fast = {"rounds": [[0.5, 1.0, 0.5], [0.5, 1.0, 1.0]]}
    step = {"dense": ticks, "promoe grouped_mm": fast, "promoe paper loop": {"failed": "out of memory"}}
    elsewhere = {"commit": "1234567", "versions": "torch", "device": "a GPU", "rounds": "5"}
    save_point(tmp_path, "step s fp32 micro 8", {"facts": elsewhere, "systems": step})
    calls = []

    def points(args: Any) -> Any:
        for name in ("step s fp32 micro 8", "step b fp32 micro 8"):
            yield name, lambda name=name: calls.append(name) or step

    monkeypatch.setattr(throughput, "points", points)
    assert guarded(throughput.run, ["--section", "step", "--out", str(tmp_path), "--rounds", "3"]) == 0
    assert calls == ["step b fp32 micro 8"] and list(load_points(tmp_path)) == ["step s fp32 micro 8", *calls]
    text = (tmp_path / "page.md").read_text()
    assert text in capsys.readouterr().out
    assert "| rounds | 5; 3 |" in text, "the head tells of every point, not of the last command"
    assert "| s fp32 micro 8 | promoe grouped_mm |" in text and "2.00 (2.00 to 2.00)" in text
    assert "| promoe paper loop | out of memory |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--section x", "argument --section: 'x' is none of step, layer, sampling; see --help"),
        ("--sizes s,q", "argument --sizes: 'q' is none of s, b, l, xl"),
        ("--precision fp8", "argument --precision: 'fp8' is none of fp32, bf16"),
        ("--routing foo", "argument --routing: 'foo' is none of learned, uniform, skewed"),
        ("--micro 8,0", "argument --micro: '8,0' is not a list of numbers of 1 or more"),
        ("--micro x", "argument --micro: 'x' is not a list"),
        ("--rounds 0", "--rounds=0: must be positive; choose 1 or more"),
        ("--systems [", "argument --systems: '[' is no regular expression"),
        ("--official {folder}", "holds no models/models_ProMoE_TC.py; name a clone of ali-vilab/ProMoE"),
        ("--out {file}", "is not a folder; choose another"),
        ("--page {folder}", "is a folder, or lies in none; name a file in a folder that is there"),
        ("--page {folder}/nowhere/page.md", "is a folder, or lies in none"),
        ("--minutes 0 --out {folder}/cut", "is damaged"),
        ("--section step --out {folder}/cut", "is damaged"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "layer.json").write_text('{"s fp32')
    before = sorted(tmp_path.rglob("*"))
    line = words.format(file=tmp_path / "file", folder=tmp_path).split()
    assert guarded(throughput.run, line) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before


def test_no_figures_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(throughput.run, ["--minutes", "-1", "--out", str(tmp_path)]) == 2
    assert "holds no figures; allow more --minutes" in capsys.readouterr().err


def test_every_section_has_points_and_a_table() -> None:
    names = [name.split()[0] for name, _ in throughput.points(throughput.parse_args(["--routing", "learned"]))]
    assert names == ["step", "layer", "sampling"] and sorted(throughput.SECTIONS) == sorted(names)


def test_the_mfu_of_a_system_is_that_of_its_own_model() -> None:
    ticks = {"rounds": [[1.0, 2.0, 1.0]]}
    names = ("dense", "dense compiled", "promoe grouped_mm", "promoe compiled")
    point = {"systems": dict.fromkeys(names, ticks)}
    (text,) = throughput.tables({"step s fp32 micro 8": point}, 1e9)
    dense, dense_compiled, promoe, promoe_compiled = [row.split("|")[5] for row in text.splitlines()[4:]]
    assert dense == dense_compiled != promoe == promoe_compiled


def test_megablocks_agrees_with_the_loop() -> None:
    problem = backend_problem("megablocks", "cuda" if torch.cuda.is_available() else "cpu")
    if problem:
        pytest.skip(f"moe.experts_backend=megablocks {problem}")
    made, x, split = layer()
    made, x = made.cuda(), x.cuda()
    split = throughput.split_of(4, torch.device("cuda"))
    outs = []
    for backend in ("loop", "megablocks"):
        made.routed.experts.backend = backend  # type: ignore[union-attr, assignment]
        with torch.autocast("cuda", torch.bfloat16):
            y = made(x, split)[0]
        y.sum().backward()
        outs.append((y.detach(), *(p.grad.clone() for p in made.routed.parameters() if p.grad is not None)))  # type: ignore[union-attr]
        made.zero_grad()
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
