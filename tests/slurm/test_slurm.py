"""The batch scripts as they stand, on a real Slurm of two emulated nodes: `make test-slurm`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.processes import wait_until
from promoe_ds.checkpoint import layout
from tests.launch import ROOT, train
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.slurm
CPU = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def settings(folder: Path, **more: object) -> dict[str, str]:
    """Variables of a submission whose outputs go to FOLDER/JOB.out."""
    return {**CPU, "SBATCH_OUTPUT": f"{folder}/%A.out", **{key: str(value) for key, value in more.items()}}


def write_recipe(path: Path, **train_keys: object) -> str:
    tree = {"base": "tiny", "optimizer": {"lr": 1e-4}, "train": train_keys}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def losses(run: Path) -> dict[int, float]:
    """Loss by step, of what is written so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return {r["step"]: r["loss"] for r in (json.loads(line) for line in lines if line.endswith("\n"))}


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def output(folder: Path, job: str) -> str:
    path = folder / f"{job}.out"
    return path.read_text(encoding="utf-8") if path.exists() else ""


TRAINER = re.compile(r"^.*: (?:starting|resuming at step) .*$", re.MULTILINE)
REASON = re.compile(
    r"^\S+ \S+ (?:stopped and saved|stopped before the ranks started|a node does not answer .*); requeueing$"
    r"|\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ DUE TO (?:NODE FAILURE|PREEMPTION)",
    re.MULTILINE,
)
"""why a start ended before the job was done, in the words of the script or of Slurm"""


class Training:
    """A training job under test: what it has done so far, and how often it was started."""

    def __init__(self, cluster: Cluster, job: str, folder: Path, run: Path):
        self.cluster, self.job, self.folder, self.run = cluster, job, folder, run

    def starts(self) -> list[str]:
        """The trainer's line of every start: `4 x cpu, ... resuming at step S`."""
        return TRAINER.findall(output(self.folder, self.job))

    def script_starts(self) -> list[tuple[int, str]]:
        """Number and output of every start of the script, also of those that ended before the trainer's line."""
        heads = r"^\S+ \S+ start (\d+) of job \d+ on .*\n"
        _, *parts = re.split(heads, output(self.folder, self.job), flags=re.MULTILINE)
        return [(int(number), text) for number, text in zip(parts[::2], parts[1::2], strict=True)]

    def state(self) -> str:
        return self.cluster.states(self.job)[0]

    def wait(self, true: Any, what: str) -> None:
        """Until it is true, or show the job's output."""
        text = lambda: f"{what}: job is {self.state()}\n{output(self.folder, self.job)[-6000:]}"  # noqa: E731
        over = lambda: self.state() in ("FAILED", "CANCELLED", "COMPLETED")  # noqa: E731
        found = wait_until(lambda: "true" if true() else over(), lambda: output(self.folder, self.job), text)
        assert found == "true", text()

    def first_step(self, number: int) -> int:
        """The step that start NUMBER went on from."""
        found = re.search(r"resuming at step (\d+)", self.starts()[number - 1])
        return int(found[1]) if found else 0

    def wait_start(self, number: int) -> int:
        """Until start NUMBER has made some steps; the step it went on from."""
        self.wait(lambda: len(self.starts()) >= number, f"start {number}")
        first = self.first_step(number)
        self.wait(lambda: last_step(self.run) >= first + 3, f"steps after start {number}")
        return first

    def saved(self) -> int:
        return max((layout.step_of(path) for path in layout.candidates(self.run)), default=0)


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`slurm/pipeline.sh` whose training is preempted, loses a node, runs on one, gets the signal, and ends."""
    folder = tmp_path_factory.mktemp("pipeline")
    run = folder / "run"
    endless = {"steps": 100_000, "checkpoint_every": 12, "keep_last": 3}
    recipe = write_recipe(folder / "recipe.yaml", **endless)
    env = settings(folder, RECIPE=recipe, RUN=run, EP=2, DS_CONFIG="ds_configs/zero2.json", NUM=40, CFG="1.0,1.5",
                   STEPS=4, BATCH=10, PRECISION="fp32", NODES=2, MIN_NODES=1, GPUS_PER_NODE=2)  # fmt: skip
    submitted = cluster.run("slurm/pipeline.sh", env=env)
    assert submitted.returncode == 0, submitted.stderr
    jobs = dict(line.split() for line in submitted.stdout.splitlines())
    assert list(jobs) == ["train", "sample", "evaluate"]
    job = Training(cluster, jobs["train"], folder, run)
    resumed = [job.wait_start(1)]

    # an urgent job takes both nodes for a moment
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.sbatch(*urgent)
    resumed.append(job.wait_start(2))

    # a node is lost, with steps that no checkpoint has; the job goes on without it
    job.wait(lambda: job.saved() > resumed[1], "a checkpoint by interval")
    cluster.crash("node2")
    kept = job.saved()
    resumed.append(job.wait_start(3))
    assert kept <= resumed[2] <= kept + 12
    cluster.boot("node2")

    # the warning before the time limit; from now on the run has an end, on both nodes again
    assert cluster.run("scancel", "--signal=USR2", "--batch", jobs["train"]).returncode == 0
    job.wait(lambda: job.state() == "PENDING", "requeue after USR2")
    steps = last_step(run) + 10
    write_recipe(folder / "recipe.yaml", **{**endless, "steps": steps})
    told = lambda: output(folder, jobs["train"])[-3000:]  # noqa: E731
    wait_until(lambda: job.state() == "COMPLETED", told, told)
    resumed.append(job.first_step(4))
    return {"folder": folder, "run": run, "jobs": jobs, "job": job, "resumed": resumed, "steps": steps}


def test_a_job_outlives_preemption_a_lost_node_and_the_warning(cluster: Cluster, interrupted: dict[str, Any]) -> None:
    job, run = interrupted["job"], interrupted["run"]
    # Every start that Slurm counts is in the log, with its reason to end. There may be more than the four that the
    # events explain: after a lost node Slurm repeats what it had to tell it, now and then to a new step of that number.
    starts = job.script_starts()
    for number, text in starts:
        line, reason = TRAINER.search(text), REASON.search(text)
        print(f"start {number}: {line and line[0]}\n  {(reason and reason[0]) or text.splitlines()[-1]}")
        assert reason if number < len(starts) else text.endswith("exit code 0\n"), text
    restarts = int(cluster.fields(job.job)[0]["Restarts"])
    assert [number for number, _ in starts] == list(range(1, restarts + 2))
    ranks = [int(re.findall(r"(\d+) x cpu", line)[0]) for line in job.starts()]
    assert ranks[:3] == [4, 4, 2] and set(ranks[3:]) == {4} and all("ep 2" in line for line in job.starts())
    resumed = interrupted["resumed"]
    assert resumed == sorted(set(resumed)), "every start goes on from a later step"
    text = output(interrupted["folder"], job.job)
    assert "node1: ranks 0-1, groups 0-1\n  node2: ranks 2-3, groups 2-3" in text
    assert "2 ranks on 1 of 1 nodes" in text
    assert not (run / "requeue").exists() and last_step(run) == interrupted["steps"]


def test_the_curve_is_that_of_one_process(interrupted: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=interrupted["steps"], checkpoint_every=1000)
    train("--config", recipe, "--run", str(tmp_path / "one"))
    one, many = losses(tmp_path / "one"), losses(interrupted["run"])
    assert one.keys() == many.keys() and len(one) == interrupted["steps"]
    worst = max(abs(many[step] / one[step] - 1) for step in one)
    print(f"{len(one)} steps, {len(interrupted['resumed'])} starts: worst relative deviation of the loss {worst:.1e}")
    assert worst < 1e-5


def test_the_pipeline_ends_with_scores(cluster: Cluster, interrupted: dict[str, Any]) -> None:
    jobs, folder = interrupted["jobs"], interrupted["folder"]
    for stage in ("sample", "evaluate"):
        assert cluster.wait(jobs[stage]) == ["COMPLETED"], output(folder, jobs[stage])[-4000:]
    scores = json.loads((interrupted["run"] / "metrics.json").read_text(encoding="utf-8"))
    text = json.dumps(scores)
    assert "cfg1.0" in text and "cfg1.5" in text


def test_wrong_submissions_end_before_the_ranks_start(cluster: Cluster, tmp_path: Path) -> None:
    """One line, exit code 2, no run folder; jobs that wait for it are cancelled."""
    images = "data.name=images model.num_classes=2"
    cases = {
        "train": ("slurm/promoe_xl.sbatch", {"EP": 3}, r"parallel.expert_parallel=3: does not divide the world size 4"),
        "node": ("slurm/promoe_xl.sbatch", {"EP": 4}, r"expert_parallel=4: does not divide the 2 ranks of a node"),
        "data": ("slurm/promoe_xl.sbatch", {"OVERRIDES": images, "DATA": "/absent/images"}, r"/absent/images"),
        "typo": ("slurm/promoe_xl.sbatch", {"OVERRIDES": "train.stepz=5"}, r"train.stepz"),
        "sample": ("slurm/sample.sbatch", {}, r"--run="),
        "evaluate": ("slurm/evaluate.sbatch", {}, r"--run="),
        "encode": ("slurm/encode.sbatch", {"IMAGES": "/absent/tree", "VAE": "identity"}, r"/absent"),
        "study": ("slurm/scaling_study.sbatch", {"WORLD": 2, "EP": 5}, r"no point is possible"),
    }  # fmt: skip
    jobs = {}
    for name, (script, variables, _) in cases.items():
        env = settings(tmp_path, **{"RECIPE": "tiny", "RUN": tmp_path / "run", "OUT": tmp_path / "out", **variables})
        options = ("--nodes=2", "--gpus-per-node=2") if name == "node" else ("--nodes=1", "--gpus-per-node=4")
        jobs[name] = cluster.sbatch(*options, *(("--array=0",) if name == "study" else ()), script, env=env)
    env = settings(tmp_path, RECIPE="tiny", RUN=tmp_path / "run", OVERRIDES="moe.num_expert=3", NODES=1)
    chain = dict(line.split() for line in cluster.run("slurm/pipeline.sh", "--chain", "2", env=env).stdout.splitlines())
    for name, (_, _, expected) in cases.items():
        assert cluster.wait(jobs[name]) == ["FAILED"], name
        assert cluster.fields(jobs[name])[0]["ExitCode"] == "2:0", name
        text = output(tmp_path, jobs[name])
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and re.search(expected, errors[0]) and "Traceback" not in text, (name, text)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out" / "runs").exists()
    assert list(chain) == ["train-1", "train-2", "sample", "evaluate"]
    states = {stage: cluster.wait(job)[0] for stage, job in chain.items()}
    assert states == {"train-1": "FAILED", "train-2": "CANCELLED", "sample": "CANCELLED", "evaluate": "CANCELLED"}


def test_encoding(cluster: Cluster, tmp_path: Path) -> None:
    """Two nodes share the work; the trainer's own check reads what they wrote."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    env = settings(tmp_path, IMAGES=tmp_path / "images", VAE="identity", OUT=tmp_path / "latents", SIZE=8,
                   ENCODE_OPTIONS="--shard-size 2")  # fmt: skip
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=2", "slurm/encode.sbatch", env=env)
    assert cluster.wait(job) == ["COMPLETED"], output(tmp_path, job)[-4000:]
    assert json.loads((tmp_path / "latents" / "index.json").read_text())["classes"] == ["a", "b"]
    words = ["data.name=latents", f"data.path={tmp_path}/latents", "model.num_classes=2", "model.channels=3"]
    train("--config", "tiny", "--run", str(tmp_path / "run"), "--dry-run", "--check-files", *words)


RANK = """#!/bin/bash
# instead of Python: the first start never ends by itself, ranks hear TERM like launchers, or not yet
case "$*" in *--dry-run*) exit ;; esac
if [[ -e $RUN/up$RANK ]]; then exit; fi
touch "$RUN/up$RANK"
if ((RANK == 0)); then trap 'exit 85' TERM; fi
if [[ $DIES && $RANK == 1 ]]; then until [[ -e $RUN/up0 ]]; do sleep 0.1; done; kill -KILL $$; fi
sleep 300 & wait
"""


def write_rank(folder: Path) -> dict[str, str]:
    """Variables of a submission whose Python is RANK."""
    (folder / "samples").mkdir()
    (folder / "python").write_text(RANK, encoding="utf-8")
    (folder / "python").chmod(0o755)
    return settings(folder, PYTHON=folder / "python", RUN=folder, DIES="")


def test_a_preempted_job_is_requeued_and_not_one_whose_rank_is_killed_or_that_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    env = write_rank(tmp_path)
    killed = cluster.sbatch("--gpus-per-node=2", "slurm/sample.sbatch", env=env | {"DIES": "1"})
    assert cluster.wait(killed) == ["FAILED"]
    assert cluster.fields(killed)[0]["Restarts"] == "0" and output(tmp_path, killed).endswith("exit code 137\n")

    def start() -> str:
        for path in tmp_path.glob("up*"):
            path.unlink()
        job = cluster.sbatch("--gpus-per-node=2", "slurm/evaluate.sbatch", env=env)
        wait_until(lambda: len(list(tmp_path.glob("up*"))) == 2, what=lambda: "ranks")
        return job

    cancelled = start()
    assert cluster.run("scancel", cancelled).returncode == 0
    assert cluster.wait(cancelled) == ["CANCELLED"]
    assert cluster.fields(cancelled)[0]["Restarts"] == "0", output(tmp_path, cancelled)
    assert "the job was cancelled; submit the same command again to go on" in output(tmp_path, cancelled)
    job = start()
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert cluster.wait(job) == ["COMPLETED"], output(tmp_path, job)
    assert cluster.fields(job)[0]["Restarts"] == "1" and "stopped and saved; requeueing" in output(tmp_path, job)


def test_a_job_that_another_has_submitted_is_a_job_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """It inherits the other's number in an array, how often that was restarted, and its share of a node's memory."""
    inner = f"sbatch --parsable --gpus-per-node=2 slurm/evaluate.sbatch >{tmp_path}/inner"
    script = f"""#!/bin/bash
        [[ $SLURM_RESTART_COUNT ]] || {{ scontrol requeue "$SLURM_ARRAY_JOB_ID"_3; sleep 60; }}
        srun --ntasks=3 --exact bash -c '((SLURM_PROCID)) || {inner}'
        until [[ -e {tmp_path}/done ]]; do sleep 0.2; done"""
    (tmp_path / "outer.sh").write_text(script, encoding="utf-8")
    options = ["--array=3", "--ntasks=3", "--ntasks-per-gpu=1", "--gpus=3", "--mem=1000", f"--chdir={ROOT}"]
    outer = cluster.sbatch(*options, f"{tmp_path}/outer.sh", env=write_rank(tmp_path))
    told = lambda: output(tmp_path, outer)  # noqa: E731
    wait_until(lambda: len(list(tmp_path.glob("up*"))) == 2, told, told)
    job = (tmp_path / "inner").read_text(encoding="utf-8").strip()
    assert "mem=62.50G," in cluster.run("scontrol", "-o", "show", "step", f"{job}.0").stdout
    assert cluster.run("scancel", "--signal=TERM", job).returncode == 0
    assert cluster.wait(job) == ["COMPLETED"], output(tmp_path, job)
    (tmp_path / "done").touch()
    assert cluster.wait(outer) == ["COMPLETED"], told()
    assert [cluster.fields(name)[0]["Restarts"] for name in (job, outer)] == ["1", "1"]
    assert re.findall(r"start (\d+) of job (\S+) ", output(tmp_path, job)) == [("1", job), ("2", job)]


def test_the_array_job_of_the_study_ends_with_its_table(cluster: Cluster, tmp_path: Path) -> None:
    env = settings(tmp_path, RECIPE="tiny", WORLD="2,4", EP=2, STAGE=1, BATCH="strong", OUT=tmp_path / "study",
                   STUDY_OPTIONS="--window 2 --windows 2", GPUS_PER_NODE=2)  # fmt: skip
    submitted = cluster.run("slurm/scaling_study.sh", env=env)
    assert submitted.returncode == 0, submitted.stderr
    jobs = [line.split()[-1] for line in submitted.stdout.splitlines()]
    for job in jobs:
        assert cluster.wait(job) == ["COMPLETED"], output(tmp_path, job)[-4000:]
    assert [cluster.fields(job)[0]["NumNodes"] for job in jobs] == ["1", "2"]
    page = (tmp_path / "study" / "scaling.md").read_text(encoding="utf-8")
    assert "2 nodes, the first: " in page
    assert re.findall(r"^\| (\d+) ", page, re.MULTILINE) == ["2", "4"] * 3  # three tables


def blocks(heading: str) -> list[str]:
    """Batch scripts in a section of docs/slurm.md."""
    section = (ROOT / "docs/slurm.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(#!/.*?)```", section, re.DOTALL)


def test_the_two_other_ways_in(cluster: Cluster, tmp_path: Path) -> None:
    """torchrun and the deepspeed launcher with a hostfile, by the scripts in docs/slurm.md."""
    scripts = blocks("Other launchers")
    curves = []
    for name, text in zip(("torchrun", "deepspeed"), scripts, strict=True):
        path, run = tmp_path / f"{name}.sbatch", tmp_path / name
        path.write_text(text, encoding="utf-8")
        binaries = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        words = f"--config tiny --run {run} train.steps=5 parallel.expert_parallel=2"
        env = settings(tmp_path, RUN=run, STEPS=5, TRAIN=words, PATH=binaries)
        job = cluster.sbatch("--nodes=2", "--gpus-per-node=2", str(path), env=env)
        assert cluster.wait(job) == ["COMPLETED"], output(tmp_path, job)[-6000:]
        assert "4 x cpu" in output(tmp_path, job)
        curves.append(losses(run))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and len(curves[0]) == 5


def test_starts_that_save_nothing_are_counted(cluster: Cluster, tmp_path: Path) -> None:
    script = "source slurm/common.sh; count_starts $RUN step_1 && count_starts $RUN $NEXT && count_starts $RUN $NEXT"
    env = {**CPU, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "RUN": str(tmp_path), "MAX_STARTS": "2"}
    stuck = cluster.run("bash", "-c", script, env={**env, "NEXT": "step_1"})
    assert stuck.returncode == 1
    assert stuck.stderr.startswith("error: 2 starts in a row saved nothing (step_1)")
    assert cluster.run("bash", "-c", script, env={**env, "NEXT": "step_2", "SLURM_JOB_ID": "8"}).returncode == 0


def test_fewer_nodes_where_the_batch_does_not_divide(cluster: Cluster, tmp_path: Path) -> None:
    """3 nodes of 2 are left; 6 ranks do not divide a batch of 32, so 2 nodes go on, if MIN_NODES allows. Ep is the
    recipe's."""
    (tmp_path / "recipe.yaml").write_text("base: tiny\nparallel: {expert_parallel: 2}\n", encoding="utf-8")
    train_words = f"launchers/train.py --config {tmp_path}/recipe.yaml --run /absent/run"
    script = f"source slurm/common.sh; check_nodes {train_words}; echo $NODES; place"
    env = {**CPU, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "TASKS_PER_NODE": "2"}
    env |= {"SLURM_JOB_NODELIST": "gpu[07-09]"}
    fewer = cluster.run("bash", "-c", script, env={**env, "MIN_NODES": "1"})
    assert fewer.returncode == 0, fewer.stderr
    assert fewer.stdout.splitlines()[1] == "2"
    assert fewer.stdout.splitlines()[3:] == ["  gpu07: ranks 0-1, groups 0-1", "  gpu08: ranks 2-3, groups 2-3"]
    without = cluster.run("bash", "-c", script, env={**env, "TASKS_PER_NODE": "", "SLURM_GPUS_PER_NODE": "0"})
    assert (without.returncode, without.stderr.count("\n")) == (2, 1) and "without GPUs set it" in without.stderr
    refused = cluster.run("bash", "-c", script, env=env)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "is not divisible by the world size 6" in refused.stderr


def test_pipeline_in_words(cluster: Cluster) -> None:
    env = {**CPU, "RECIPE": "digits", "IMAGES": "/data/train", "VAE": "/data/vae", "DATA": "latents", "NODES": "4"}
    done = cluster.run("slurm/pipeline.sh", "--dry-run", env={**env, "MIN_NODES": "2"})
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["encode", "train", "sample", "evaluate"], done.stderr
    assert lines[1].endswith(
        "--dependency=afterok:<encode> --kill-on-invalid-dep=yes --nodes=2-4 slurm/promoe_xl.sbatch"
    )
    for arguments, variables, message in (
        ((), {}, "error: IMAGES=/data/train: no such file"),
        (("--dry-run",), {"VAE": ""}, "error: IMAGES=/data/train: needs VAE=DIR"),
        (("--chain", "0"), {}, "error: --chain=0: is not a number of jobs"),
        (("--chain",), {}, "error: --chain=: is not a number of jobs"),
        (("--dryrun",), {}, "error: --dryrun: is no option"),
    ):
        wrong = cluster.run("slurm/pipeline.sh", *arguments, env={**env, **variables})
        assert wrong.returncode == 2 and wrong.stderr.startswith(message) and wrong.stderr.count("\n") == 1
    assert cluster.run("squeue", "-h").stdout == ""
