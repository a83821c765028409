"""The shell of the batch scripts where no Slurm is needed; tests/slurm runs them on a real one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of slurm/ in a folder whose name has blanks."""
    shutil.copytree(ROOT / "slurm", tmp_path / "a b" / "slurm")
    return tmp_path / "a b"


def shell(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PYTHON"))}
    return subprocess.run(command, cwd=folder, env=clean | variables, capture_output=True, text=True)


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("script", ["promoe_xl", "encode", "sample", "evaluate", "scaling_study"])
def test_a_script_started_without_slurm_says_so(folder: Path, script: str) -> None:
    done = shell(folder, "bash", f"slurm/{script}.sbatch", PROMOE_ROOT=str(folder))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "this is no Slurm job; submit the script with sbatch" in done.stderr


def test_blanks_in_the_folder_and_unset_variables_in_env_sh(folder: Path) -> None:
    write_program(folder / ".venv/bin/python", "echo")
    with (folder / "slurm/env.sh").open("a", encoding="utf-8") as file:
        file.write('PROMPT="$PS1_THAT_NOBODY_SET" WRAP="nice -n 0"\n')
    done = shell(
        folder, "bash", "-c", 'source slurm/common.sh; printf "%s\\n" "${python[@]}"; echo $-', SLURM_JOB_NUM_NODES="1"
    )
    assert done.stderr == ""
    _, *words, options = done.stdout.splitlines()
    assert words == ["nice", "-n", "0", f"{folder}/.venv/bin/python", "-u"]
    assert "u" in options


def test_a_warning_while_env_sh_runs_is_kept(folder: Path) -> None:
    """Modules may take a minute to load; by default USR2 ends a shell."""
    with (folder / "slurm/env.sh").open("a", encoding="utf-8") as file:
        file.write("kill -USR2 $$\n")
    script = "source slurm/common.sh; run_ranks 1 true"
    done = shell(folder, "bash", "-c", script, SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="7", ON_STOP="stop")
    assert (done.returncode, done.stderr) == (85, "")
    assert "stopped before the ranks started; submit the same command again" in done.stdout


def test_launch_in_an_salloc_shell(folder: Path, tmp_path: Path) -> None:
    """salloc sets no SLURM_CPUS_ON_NODE."""
    write_program(tmp_path / "bin/scontrol", "echo node1; echo node2")
    write_program(tmp_path / "bin/srun", 'printf "%s\\n" "$@"')
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"}
    done = shell(folder, "slurm/launch.sh", "4", "true", **variables, SLURM_GPUS_PER_NODE="h100:2",
                 SLURM_JOB_CPUS_PER_NODE="72(x2)", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"--nodelist=node1,node2", "--cpus-per-task=36", "--ntasks-per-node=2"} <= set(done.stdout.splitlines())


LAUNCH = """#!/usr/bin/env bash
# srun on one machine: ranks in groups of processes; when one fails, TERM to the others, and the greatest code
n=$1 worst=0
shift
export SLURM_STEP_NUM_TASKS=$n LOCAL_WORLD_SIZE=$n SLURM_NODEID=0 BASH_ENV=${EARLY_SH:-}
for ((rank = 0; rank < n; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank setsid slurm/task.sh "$@" & ranks+=($!)
done
while ((${#ranks[@]})); do # not wait -n, which forgets children that have ended already
    for i in "${!ranks[@]}"; do
        if kill -0 "${ranks[i]}" 2>/dev/null; then continue; fi
        wait "${ranks[i]}"
        code=$?
        unset "ranks[i]"
        ((code == 0)) || for rank in "${ranks[@]}"; do kill -TERM -- "-$rank" 2>/dev/null; done
        ((code <= worst)) || worst=$code
    done
    sleep 0.02
done
exit "$worst"
"""
WAIT = "touch up0; sleep 30 & wait"
HEAR = f"trap 'exit 85' TERM; {WAIT}"
FIRST_UP = "until [ -e up0 ]; do sleep 0.05; done"
REQUEUE = """case $* in
"show job"*) if [ -e up0 ]; then echo "JobId=7 JobState=$STATE"; else echo "JobId=7 JobState=$START"; fi ;;
requeue*) echo "$@"; kill -KILL $PPID ;; # as Slurm ends the script
esac"""


def job_state(state: str, reason: str = "None", restarts: int = 0, preempted: str = "None") -> str:
    """What `scontrol show job` writes."""
    return f"{state} Reason={reason} Requeue=1 Restarts={restarts} BatchFlag=1 PreemptTime={preempted} Partition=batch"


def ended(folder: Path, tmp_path: Path, ranks: tuple[str, ...], answer: str = "exit 0", **variables: str) -> str:
    """Run ranks as a short job does; returns its error or last line. `answer`: what nodes do when they are asked."""
    write_program(tmp_path / "bin/scontrol", REQUEUE)
    write_program(tmp_path / "bin/srun", answer)
    (folder / "slurm/launch.sh").write_text(LAUNCH, encoding="utf-8")
    for rank, text in enumerate(ranks):
        write_program(folder / f"rank{rank}", text)
    run = f"run_ranks {len(ranks)} -c 'exec ./rank$RANK'"
    script = f"source slurm/common.sh; {variables.pop('SCRIPT', '')} count_starts out 0; {run}; finish"
    usual = {
        "START": job_state("RUNNING"),
        "STATE": job_state("RUNNING"),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    usual |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "PYTHON": "/bin/bash"}
    done = shell(folder, "bash", "-c", script, **usual | variables)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return [*done.stdout.splitlines(), *errors][-1]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((HEAR, f"{FIRST_UP}; exit 85"), "requeue 7"),  # launchers that hear the signal
        ((WAIT, "exit 0", f"{FIRST_UP}; exit 85"), "requeue 7"),  # dies of it before Python hears it; one is done
        (("{ sleep 0.3; kill -TERM $PPID; } & kill -TERM $$",), "requeue 7"),  # its TERM before that of task.sh
        (("exit 0", "exit 0"), "exit code 0"),
        ((HEAR, f"{FIRST_UP}; exit 3"), "exit code 1"),  # a crash: 85 is the greater code
        ((HEAR, f"{FIRST_UP}; kill -KILL $$"), "exit code 137"),
        ((WAIT, f"{FIRST_UP}; kill -TERM $$"), "exit code 143"),  # not by Slurm
    ],
)
def test_a_rank_that_dies_is_no_stop(folder: Path, tmp_path: Path, ranks: tuple[str, ...], expected: str) -> None:
    """What the short jobs do about their end: all ranks done or stopped from outside is a requeue, else a failure."""
    assert ended(folder, tmp_path, ranks).endswith(expected)


@pytest.mark.parametrize("hears", ["", "1"])
def test_a_rank_whose_bash_dies_before_it_reads_the_script_is_stopped(folder: Path, tmp_path: Path, hears: str) -> None:
    early = tmp_path / "early.sh"
    early.write_text("[[ $0 != */task.sh || $SLURM_PROCID != 1 ]] || kill -TERM $$", encoding="utf-8")
    script = f"HEARS_SIGNALS={hears}; [[ ! $HEARS_SIGNALS ]] || stopped() {{ false; }}; export HEARS_SIGNALS;"
    assert ended(folder, tmp_path, ("exit 0", "exit 0"), SCRIPT=script, EARLY_SH=str(early)).endswith("requeue 7")


CANCELLED = job_state("COMPLETING")


@pytest.mark.parametrize(
    ("start", "state", "expected"),
    [
        (0, job_state("RUNNING"), "requeue 7"),  # preempted, with a grace time
        (0, CANCELLED, "the job was cancelled; submit the same command again to go on"),
        (1, job_state("COMPLETING", restarts=1), "the job was cancelled; submit the same command again to go on"),
        (0, job_state("COMPLETING", reason="TimeLimit"), "requeue 7"),
        (0, job_state("COMPLETING", preempted="2026-11-29T12:45:02"), "requeue 7"),
        (0, job_state("COMPLETING", restarts=1), "requeue 7"),  # by Slurm already
    ],
)
def test_a_cancelled_job_is_not_requeued(folder: Path, tmp_path: Path, start: int, state: str, expected: str) -> None:
    states = {"START": job_state("RUNNING", restarts=start), "STATE": state}
    assert ended(folder, tmp_path, (HEAR, f"{FIRST_UP}; exit 85"), **states).endswith(expected)


def test_a_node_that_does_not_answer_is_a_requeue_but_not_of_a_cancelled_job(folder: Path, tmp_path: Path) -> None:
    assert ended(folder, tmp_path, ("touch up0; exit 3",), answer="exit 1").endswith("requeue 7")
    assert ended(folder, tmp_path, ("touch up0; exit 3",), answer="exit 1", STATE=CANCELLED).endswith("exit code 3")


@pytest.mark.parametrize("before", ["rm -rf", "[[ $asked != waits"])
def test_a_warning_while_the_ranks_are_started_is_passed_on_once(folder: Path, tmp_path: Path, before: str) -> None:
    """It comes before the command of `run_ranks` that begins so."""
    write_program(tmp_path / "bin/scancel", 'echo "$@" >>passed; exec touch up1')
    stops = "n=0; until [ -e up1 ] || [ $((n += 1)) -gt 200 ]; do sleep 0.05; done; exit 85"
    warn = "trap 'if [[ $BASH_COMMAND == \"$BEFORE\"* && ! ${sent:-} ]]; then sent=1; kill -USR2 $$; fi' DEBUG"
    assert ended(folder, tmp_path, (stops,), SCRIPT=f"EARLY=0; set -T; {warn};", BEFORE=before).endswith("requeue 7")
    assert (folder / "passed").read_text(encoding="utf-8") == "--signal=TERM 7\n"


@pytest.mark.parametrize(
    ("how", "code", "text", "words"),
    [
        ("PROMOE_ENDS", 85, "", "stopped\n"),
        ("HEARS_SIGNALS", 0, "started\n", None),  # what train.py does about them it does itself
        ("PLAIN", -signal.SIGTERM, "", None),
    ],
)
def test_a_signal_before_the_command(
    folder: Path, tmp_path: Path, how: str, code: int, text: str, words: str | None
) -> None:
    early = tmp_path / "early.sh"
    early.write_text("trap 'if [[ $BASH_COMMAND == export* ]]; then kill -TERM $$; fi' DEBUG", encoding="utf-8")
    variables = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    variables |= {"LOCAL_WORLD_SIZE": "1", "BASH_ENV": str(early), how: str(tmp_path)}
    done = shell(folder, "bash", "slurm/task.sh", "echo", "started", **variables)
    assert (done.returncode, done.stdout) == (code, text), done.stderr
    left = tmp_path / "0"
    assert (left.read_text(encoding="utf-8") if left.exists() else None) == words


def test_ranks_that_are_not_in_blocks_are_refused(folder: Path) -> None:
    variables = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    done = shell(folder, "slurm/task.sh", "echo", "started", LOCAL_WORLD_SIZE="2", **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_an_exit_code_of_0_is_not_enough(folder: Path, tmp_path: Path) -> None:
    """A launcher that is killed may give it: training looks for its last checkpoint, others for the ranks' words."""
    write_program(tmp_path / "bin/scontrol", "echo node1")
    for name in ("launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    variables = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "TASKS_PER_NODE": "1"}
    variables |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "DEVICE": "cpu"}
    variables |= {"PROMOE_ROOT": str(folder), "RUN": "run", "RECIPE": "tiny", "OVERRIDES": "train.steps=2"}
    other = "source slurm/common.sh; count_starts run 0; run_ranks 1 -c pass; finish"
    works = 'shift; RANK=0 WORLD_SIZE=1 SLURM_PROCID=0 exec "$@"'
    for job, launcher, code in (
        (["slurm/promoe_xl.sbatch"], "exit 0", 1),
        (["slurm/promoe_xl.sbatch"], works, 0),
        (["-c", other], "exit 0", 1),
    ):
        write_program(folder / "slurm/launch.sh", launcher)
        done = shell(folder, "bash", *job, **variables)
        assert done.returncode == code, done.stdout + done.stderr
        assert ("error: the ranks ended with exit code 0, but not all is done" in done.stderr) == (code == 1)


@pytest.mark.parametrize("hears", ["1", ""])
def test_words_of_the_ranks_are_cleared_up_and_nothing_else(folder: Path, tmp_path: Path, hears: str) -> None:
    """Not the folder of a job that submits this one, with its variables; and the end of a chain leaves none either."""
    (folder / "mine").mkdir()
    write_program(tmp_path / "bin/srun", "exit 0")  # all nodes answer
    (folder / "slurm/launch.sh").write_text(LAUNCH, encoding="utf-8")
    write_program(folder / "rank0", "exit $CODE")
    script = f"source slurm/common.sh; export HEARS_SIGNALS={hears}; count_starts out 0; run_ranks 1 ./rank0; finish"
    variables = {"PROMOE_ENDS": f"{folder}/mine", "HEARS_SIGNALS": "1", "ON_STOP": "stop", "PYTHON": "/bin/bash"}
    for code, expected in (("0", 0), ("85", 1 if hears else 85)):
        done = shell(folder, "bash", "-c", script, SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="7", CODE=code, **variables,
                     PATH=f"{tmp_path}/bin:{os.environ['PATH']}")  # fmt: skip
        assert done.returncode == expected, done.stdout + done.stderr
        assert list((folder / "mine").iterdir()) == [] and list((folder / "out").glob(".ends-*")) == []


def test_a_pipeline_that_cannot_be_submitted_leaves_no_jobs(folder: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "bin/sbatch", "case $* in *evaluate*) echo no >&2; exit 1 ;; *) echo 7 ;; esac")
    write_program(tmp_path / "bin/scancel", 'echo "cancelled $#"')
    done = shell(folder, "slurm/pipeline.sh", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "cancelled 2")
    assert done.stderr.splitlines()[1].startswith("error: evaluate was not submitted")


def test_a_study_is_submitted_by_its_sizes(folder: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "bin/python", "echo point; echo point")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = shell(folder, "slurm/scaling_study.sh", "--dry-run", PATH=path, WORLD="4,16")
    words = [line.split() for line in done.stdout.splitlines()]
    assert [line[1:7] for line in words] == [
        [f"{world}:", "sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=8", "--array=0-1"]
        for world, nodes in ((4, 1), (16, 2))
    ], done.stderr
    wrong = shell(folder, "slurm/scaling_study.sh", "--dry-run", WORLD="12")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "WORLD=12: does not fill nodes of 8" in wrong.stderr


def test_a_task_of_an_array_requeues_itself_alone(folder: Path, tmp_path: Path) -> None:
    """The last task has the number of the array as its SLURM_JOB_ID, and that means all of them to scontrol."""
    write_program(tmp_path / "bin/scontrol", '[ "$1" = show ] || { echo "$@"; kill -KILL $PPID; }')
    names = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = shell(folder, "bash", "-c", "source slurm/common.sh; again lost", **names, PATH=path)
    assert done.stdout.splitlines()[-1] == "requeue 7_2", done.stderr


def test_what_another_job_has_left_in_the_environment(folder: Path, tmp_path: Path) -> None:
    """sbatch passes the variables of the job that calls it on; a job that is none of an array sets no others."""
    write_program(tmp_path / "bin/scontrol", 'echo "JobId=9 JobName=a Restarts=0 JobState=RUNNING"')
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "4"}
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_MEM_PER_NODE": "1000", "SLURM_NTASKS_PER_GPU": "1"}
    bound = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x1"}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    own = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "9", "PATH": path}
    script = "source slurm/common.sh; env | grep ^SLURM_ | sort"
    done = shell(folder, "bash", "-c", script, **own, **task, **step, **bound)
    first, *left = done.stdout.splitlines()
    assert "start 1 of job 9 on" in first and left == ["SLURM_JOB_ID=9", "SLURM_JOB_NUM_NODES=1"], done.stderr
    wanted = shell(folder, "bash", "-c", script, **own, SLURM_CPU_BIND="cores")
    assert "SLURM_CPU_BIND=cores" in wanted.stdout.splitlines()
