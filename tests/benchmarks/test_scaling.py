"""The scaling study by the real launcher: counted bytes are the formulas' to the byte; the cost model's arithmetic."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import pytest

from benchmarks import common, cost_model
from benchmarks.cost_model import (
    Exchanges,
    Hardware,
    crossover_images,
    exchanges,
    predict,
    reduce_seconds,
)
from benchmarks.scaling_study import read_points, run
from promoe_ds.costs import comm_volume, flops
from promoe_ds.recipes.load import load_config
from promoe_ds.utils.command_line import guarded
from tests.launch import run_forked

SMALL = ["--recipe", "tiny", "--window", "2", "--windows", "2"]
XL = load_config("imagenet256_promoe_xl")
H100 = Hardware("test", 8, 1000.0, 0.5, 400.0, 50.0, 3000.0, 80.0, 0.0, 0.0, 0.5)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three launches, one by torchrun: (2, 1, stage 1), (2, 2, stage 1), (4, 2, stage 2), with uniform routing."""
    out, forked = tmp_path_factory.mktemp("study"), partial(run, start=run_forked)
    for world, ep, stage, work in (("2", "1", "1", run), ("2", "1,2", "1", forked), ("4", "2", "2", forked)):
        options = ["--world", world, "--ep", ep, "--stage", stage, "--routing", "uniform", "--out", str(out)]
        assert guarded(work, [*SMALL, *options]) == 0
    return out


def test_counted_bytes_are_those_of_the_formulas(study):
    points = read_points(study)
    assert [(p.world, p.ep, p.stage) for p in points] == [(2, 1, 1), (2, 2, 1), (4, 2, 2)]
    for p in points:
        assert p.mismatches() == []
        assert p.formula("gradients") and p.formula("parameters") and (p.formula("all_to_all") or p.ep == 1)
        assert (p.sent("all_to_all") > 0) == (p.sent("counts") > 0) == (p.ep > 1)


def test_a_wrong_formula_would_be_seen(study, monkeypatch):
    monkeypatch.setattr(comm_volume, "gradients", lambda *args: 1)
    assert all("gradients" in p.mismatches() for p in read_points(study))


def test_every_point_has_the_parts_of_a_step(study):
    """That they share its time is a test of the meter: the mean over ranks is not the time of the rank that logs."""
    for p in read_points(study):
        assert p.parts
        for record in p.parts:
            assert record["seconds/experts"] > 0 and record["seconds/backward"] > 0 and record["seconds_per_step"] > 0


def test_report(study):
    page = (study / "scaling.md").read_text()
    assert page.count("| equal |") == 3 and "differs" not in page and "nan" not in page
    assert "over\n2 rank(s) at ep 1 (ZeRO 1), 4 rank(s) at ep 2 (ZeRO 2);" in page  # no ep 1 at stage 2
    assert re.findall(r"^\| (\d+) ", page, re.MULTILINE) == ["2", "2", "4"] * 3  # three tables
    assert (study / "scaling.png").stat().st_size > 5000


def test_a_finished_point_is_not_run_again(study, capsys):
    options = ["--world", "4", "--ep", "2", "--stage", "2", "--routing", "uniform", "--out", str(study)]
    before = {path: path.stat().st_mtime_ns for path in (study / "points").glob("*.json")}
    assert guarded(run, [*SMALL, *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in (study / "points").glob("*.json")} == before


def test_validation_reads_the_study(study):
    text = cost_model.validate([study], cores=2)
    assert "fitted on 2 points" in text and "worst" in text


def test_validation_of_no_study_names_the_option(tmp_path, capsys):
    assert guarded(cost_model.run, ["--validate", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --validate={tmp_path}: holds no finished point")


@pytest.mark.parametrize("launcher", ["false", "true"])  # the second as deepspeed, when its launch.py is killed
def test_a_failing_point_leaves_its_log(launcher, tmp_path, capsys):
    command = [*SMALL, "--world", "2", "--ep", "1", "--stage", "1", "--out", str(tmp_path), "--launch", launcher]
    assert guarded(run, command) == 1
    assert "failed, see" in capsys.readouterr().out
    assert list((tmp_path / "points").glob("*.log"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "digits_dense"], "--recipe=digits_dense: is dense"),
        (["--world", "2", "--ep", "5"], "no point is possible: parallel.expert_parallel=5"),
        (["--world", "1", "--ep", "1", "--point", "9"], "--point=9: there are 2 points, from 0; see --dry-run"),
        (["--per", "0"], "--per=0: must be positive; choose 1 or more"),
        (["--windows", "0"], "--windows=0: must be positive"),
        (["--report", "--out", "nowhere-yet"], "holds no finished point; run the study first"),
    ],
)
def test_mistakes(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(run, options) == 2
    assert message in capsys.readouterr().err


def test_dry_run_lists_what_an_array_job_would_run(capsys):
    assert guarded(run, ["--world", "1,2,4", "--ep", "1,2,4", "--stage", "1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].split("_zero")[0] for line in lines] == [
        "world1_ep1", "world2_ep1", "world2_ep2", "world4_ep1", "world4_ep2", "world4_ep4",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- cost model


def test_crossover_is_where_bytes_are_equal():
    images = crossover_images(XL)
    dense, routed = comm_volume.trained(XL)
    for ep in (2, 4):
        config = load_config("imagenet256_promoe_xl", ["train.global_batch_size=64"])
        an_image = comm_volume.all_to_all_expected(config, ep) / 64
        saved = routed * (1 - 1 / ep) * comm_volume.weight_bytes(config)
        assert images * an_image == pytest.approx(saved)


def test_without_communication_time_is_flops_over_speed():
    free = Hardware("free", 8, 1000.0, 0.5, 1e12, 1e12, 1e12, 80.0, 0.0, 0.0, 0.5)
    config = load_config("imagenet256_promoe_xl", ["train.global_batch_size=256"])
    for ep in (1, 4):
        expected = 32 * flops.train_flops(config, config.diffusion.label_drop) / 500e12
        assert predict(config, free, 8, ep).seconds == pytest.approx(expected, rel=1e-6)


def test_rows_hide_behind_the_experts_that_do_not_travel():
    """Links so slow that no work hides an exchange whole, and so fast that it all does."""
    config = load_config("imagenet256_promoe_xl", ["train.global_batch_size=256", "diffusion.label_drop=0.5"])
    slow, fast = dataclasses.replace(H100, intra_gbs=1.0), dataclasses.replace(H100, intra_gbs=1e9)
    layers, tokens, expert = len(config.moe_layers()), 256 * 32, 2 * 2 * 1152 * flops.expert_hidden(config)
    travel = comm_volume.all_to_all_expected(config, 2) / 8 / 1e9
    bare = exchanges(config, dataclasses.replace(slow, overlap=0.0), 8, 2, 1, 1.0)
    assert bare == Exchanges(pytest.approx(travel), 0.0)
    hidden = 0.5 * layers * (3 * tokens + 3 * tokens / 2) * expert / 500e12
    found = exchanges(config, slow, 8, 2, 1, 1.0)
    assert found == Exchanges(pytest.approx(travel - hidden), pytest.approx(hidden * 2 / 3))
    found = exchanges(config, fast, 8, 2, 1, 1.0)
    assert found == Exchanges(pytest.approx(0.0, abs=1e-15), pytest.approx(travel / 2 / 1e9))


def test_gradients_do_not_hide_where_rows_travel():
    config = load_config("imagenet256_promoe_xl", ["train.global_batch_size=256"])
    slow = dataclasses.replace(H100, intra_gbs=5.0)
    one, two = predict(config, slow, 8, 1), predict(config, slow, 8, 2)
    backward, taken = two.compute * 2 / 3, exchanges(config, slow, 8, 2, 1, 1.0).backward
    assert 0 < taken < backward / 3 and exchanges(config, slow, 8, 1, 1, 1.0) == Exchanges(0.0, 0.0)
    assert two.gradients == pytest.approx(reduce_seconds(config, slow, 8, 2) - 0.5 * (backward - taken))
    assert one.gradients == pytest.approx(reduce_seconds(config, slow, 8, 1) - 0.5 * backward)


def test_a_busier_rank_costs_only_expert_parallelism():
    config = load_config("imagenet256_promoe_xl", ["train.global_batch_size=256"])
    assert predict(config, H100, 8, 1, busiest=2.0) == predict(config, H100, 8, 1)
    assert predict(config, H100, 8, 4, busiest=2.0).seconds > predict(config, H100, 8, 4).seconds


@pytest.mark.parametrize(
    ("ep", "share"), [(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (3, 1.0), (12, 8 / 11), (16, 8 / 15)]
)
def test_far_peers(ep, share):
    assert H100.far(ep, 48) == pytest.approx(share)


def test_groups_of_three_on_six_gpus_of_one_node_are_near():
    assert H100.far(3, 6) == 0.0


def test_zero_2_reduces_after_every_micro_batch():
    """Counted on two processes: 4 micro-batches, 1 403 968 bytes at stage 2, 350 992 at stage 1; all-reduced, twice."""
    config = load_config("tiny", ["train.micro_batch_size=4", "moe.router={name: uniform}"])
    assert [comm_volume.gradients(config, 2, 2, stage) for stage in (1, 2)] == [350_992, 1_403_968]
    assert [comm_volume.gradients(config, 2, 2, stage, True) for stage in (0, 1, 2)] == [701_984, 701_984, 2_807_936]
    assert comm_volume.gradients(config, 2, 2, 0) == 701_984


def test_what_a_ds_config_says_of_reduction():
    key = "use_multi_rank_bucket_allreduce"
    tree = {value: {"zero_optimization": {"stage": 1, key: value}} for value in (True, False, "auto")}
    assert [comm_volume.all_reduces(tree[value]) for value in tree] == [True, False, True]
    assert comm_volume.all_reduces({}) and comm_volume.all_reduces({"zero_optimization": {"stage": 2}})


def test_reductions_are_buckets_and_borders_between_owners():
    """ProMoE-XL has more than a billion parameters, of buckets of 50 million."""
    dense, routed = comm_volume.trained(XL)
    buckets = -(-(dense + routed) // 50_000_000)
    assert comm_volume.reductions(XL, 8, 1) == buckets + 7 and comm_volume.reductions(XL, 8, 1, True) == buckets
    shards = -(-(dense + routed // 4) // 50_000_000)
    assert comm_volume.reductions(XL, 8, 4) == 2 * shards + 7 + 1
    assert comm_volume.reductions(XL, 4, 4) == shards + 3  # an expert has no replica
    assert comm_volume.reductions(XL, 1, 1) == 0


def test_two_ranks_save_no_time_by_reducing_to_the_owner():
    """An all-reduce over two ranks uses both directions of their link, a reduction one."""
    ways = [reduce_seconds(XL, H100, 2, 1, multi_rank) for multi_rank in (False, True)]
    assert ways[0] == pytest.approx(ways[1])
    ways = [reduce_seconds(XL, H100, 64, 1, multi_rank) for multi_rank in (False, True)]
    assert ways[1] / ways[0] == pytest.approx(2 * 63 / 64)


def test_points_of_another_study_are_refused(study, capsys):
    options = ["--world", "4", "--ep", "2", "--stage", "2", "--out", str(study)]
    assert guarded(run, [*SMALL, *options]) == 2
    assert "was run with routing=uniform, not learned; choose another folder" in capsys.readouterr().err


def test_the_fit_has_not_seen_the_topologies_it_is_tested_on(study):
    lines = [
        line.split("|") for line in cost_model.validate([study, study], cores=2).splitlines() if "| uniform |" in line
    ]
    used = {(line[1].strip(), line[2].strip(), line[8].strip()) for line in lines}
    assert used == {("2", "1", "fit"), ("2", "2", "test"), ("4", "2", "fit")} and len(lines) == 6


def test_what_was_measured_keeps_its_commit_and_device(study, monkeypatch):
    monkeypatch.setattr(common, "device_name", lambda world: "a login node")
    assert guarded(run, [*SMALL, "--report", "--world", "2", "--out", str(study)]) == 0
    assert "a login node" not in (study / "scaling.md").read_text()


def test_rings_that_leave_a_node_share_its_network_cards():
    assert H100.bandwidth(8, 1) == 400e9  # inside
    assert H100.bandwidth(64, 1) == 400e9  # 8 cards of 50
    assert H100.bandwidth(16, 4) == 100e9  # two members a node


def test_cost_model_page_and_mistakes(tmp_path, capsys):
    out = tmp_path / "page.md"
    assert guarded(cost_model.run, ["--world", "8,64", "--out", str(out)]) == 0
    page = out.read_text()
    assert "Modelled, not measured" in page and "Expert parallelism is slower than ep 1 in" in page
    assert guarded(cost_model.run, ["--hardware", "abacus"]) == 2
    assert "--hardware=abacus: is not known; choose one of h100" in capsys.readouterr().err
    assert guarded(cost_model.run, ["--recipe", "digits_dense"]) == 2
