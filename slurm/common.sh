# shellcheck shell=bash
# Sourced by the batch scripts, in the repository's folder: checks before the allocation is used, one srun that outlives
# signals, and what is told to Slurm when it ends. docs/slurm.md has the picture.

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
fail() { # CODE TEXT
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

[[ ${SLURM_JOB_NUM_NODES:-} ]] || fail 2 "SLURM_JOB_NUM_NODES is not set: this is no Slurm job; submit the script with sbatch"
# A job that is submitted by another one, or from an interactive one, inherits its variables, and srun reads them as options:
# the memory that one had of its node would limit the ranks here, its processors and GPUs would bind them.
unset "${!SLURM_STEP@}" SLURM_MEM_PER_{CPU,GPU,NODE} SLURM_NTASKS_PER_{GPU,TRES} SLURM_{GPUS,TRES}_PER_TASK SLURM_CPUS_PER_GPU SLURM_GPU_BIND
[[ ! ${SLURM_CPU_BIND_TYPE:-} ]] || unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" # only srun sets the _TYPE, in its tasks
# Slurm's warning before the time limit (--signal=B:USR2@...) comes to this shell; scancel passes it to all ranks (a TERM
# to srun itself would end the step by force).
pid='' asked=''
forward() {
    asked=waits
    [[ $pid ]] || return 0
    asked=passed
    ((SECONDS - began >= EARLY)) || sleep $((EARLY - SECONDS + began))
    scancel --signal="$SIGNAL" "$JOB" # steps only
}
SIGNAL=TERM
trap forward USR2 # before env.sh, which may take a minute: by default USR2 ends a shell
trap : TERM       # the ranks finish their step; Slurm's KILL still ends the job
# shellcheck source=slurm/env.sh
source slurm/env.sh # before -u: the scripts of modules, conda and .bashrc read variables that are not set
set -uo pipefail    # not -e: `wait` returns more than 128 when a signal arrives
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
read -ra python <<<"${WRAP:-}"
python+=("${PYTHON:-python}" -u) # one word: the folder may have blanks
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}       # as asked for: 8, h100:8; --exclusive gives all there are
TASKS_PER_NODE=${TASKS_PER_NODE:-${gpus##*:}}              # a rank a GPU
[[ $TASKS_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail 2 "TASKS_PER_NODE=$TASKS_PER_NODE: is not a number of ranks; without GPUs set it, and DEVICE=cpu"
MIN_NODES=${MIN_NODES:-$SLURM_JOB_NUM_NODES}               # with --nodes=MIN-MAX: use fewer if the numbers do not divide
MAX_STARTS=${MAX_STARTS:-3}                                # starts in a row that save nothing
ON_STOP=${ON_STOP:-requeue}                                # or: continue (exit 0), stop (exit 85), for jobs in a chain
EARLY=15                                                   # seconds in which ranks may not hear signals yet
export TASKS_PER_NODE DEVICE=${DEVICE:-}
export PROMOE_ENDS='' HEARS_SIGNALS=''                     # not those of a job that submitted this one
NODES=$SLURM_JOB_NUM_NODES
began=0 code=0 plan='' folder='' expected=0
# What Slurm knows of this job, as words KEY=VALUE; nothing if it does not answer.
ask() { record=$(timeout 60 scontrol show job --oneliner "${SLURM_JOB_ID:-}" 2>/dev/null | grep "^JobId=${SLURM_JOB_ID:-} "); }
field() { [[ " $record" =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }
record='' restarts=${SLURM_RESTART_COUNT:-0}
if ask; then # these may be inherited too
    restarts=$(field Restarts)
    unset SLURM_RESTART_COUNT
    [[ $(field ArrayTaskId) ]] || unset "${!SLURM_ARRAY@}"
fi
# a task of an array by its own name: one of them has the array's number, which means all tasks to scancel and scontrol
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-${SLURM_JOB_ID:-}}
say "start $((restarts + 1)) of job $JOB on ${SLURM_JOB_NODELIST:-}"

ranks() { echo $((NODES * TASKS_PER_NODE)); }

# --dry-run on the first node: a mistake ends the job in seconds, with its one line and exit code 2. Sets `plan` to what
# the dry run printed.
check() { # COMMAND...
    # shellcheck disable=SC2034 # for the script
    plan=$("${python[@]}" "$@" --dry-run) || exit $?
}

# Sets NODES to the most of the allocated nodes that the run can use, fewer than all only down to MIN_NODES: 3 nodes of 8
# are left of 4, but 24 ranks do not divide a batch of 256, so 2 nodes go on. Sets `plan` as `check` does.
check_nodes() { # COMMAND of launchers/train.py
    local first='' first_code=2
    for ((NODES = SLURM_JOB_NUM_NODES; NODES >= MIN_NODES && NODES > 0; NODES--)); do
        plan=$("${python[@]}" "$@" --dry-run --check-files --world "$(ranks)" 2>&1) && return
        code=$?
        [[ $first ]] || first=$plan first_code=$code
    done
    [[ $first ]] || fail 2 "MIN_NODES=$MIN_NODES: only $SLURM_JOB_NUM_NODES nodes are allocated; submit with --nodes=$MIN_NODES"
    echo "$first" >&2
    exit "$first_code"
}

# Prints which ranks and expert-parallel groups are on which node, by the plan of `check_nodes`: the recipe may say its
# ep itself. Refuses groups that span nodes.
place() {
    local ep first group groups host i=0
    ep=$(sed -n 's/^  ep  *\([1-9][0-9]*\)$/\1/p' <<<"$plan")
    [[ $ep ]] || fail 1 "the dry run names no ep: $plan"
    if ((TASKS_PER_NODE % ep)) && [[ ! ${EP_SPANS_NODES:-} ]]; then
        fail 2 "parallel.expert_parallel=$ep: does not divide the $TASKS_PER_NODE ranks of a node, so groups would span nodes; set EP to a divisor, or EP_SPANS_NODES=1"
    fi
    say "$(ranks) ranks on $NODES of $SLURM_JOB_NUM_NODES nodes, expert-parallel groups of $ep:"
    while read -r host && ((i < NODES)); do
        first=$((i * TASKS_PER_NODE)) groups=''
        for ((group = first / ep; group * ep < first + TASKS_PER_NODE; group++)); do
            groups+=" $((group * ep))-$((group * ep + ep - 1))"
        done
        echo "  $host: ranks $first-$((first + TASKS_PER_NODE - 1)), groups$groups"
        i=$((i + 1))
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
}

# Gives up when this job has started MAX_STARTS times while PROGRESS (any word) stayed the same.
count_starts() { # FOLDER PROGRESS
    local job='' progress='' starts=0
    folder=$1
    mkdir -p "$1" || fail 2 "$1: cannot be made; choose another folder"
    { read -r job progress starts <"$1/.starts"; } 2>/dev/null
    [[ $job == "$SLURM_JOB_ID" && $progress == "$2" ]] || starts=0
    starts=$((starts + 1))
    ((starts <= MAX_STARTS)) || fail 1 "$MAX_STARTS starts in a row saved nothing ($2); look for the cause above, or set MAX_STARTS"
    echo "$SLURM_JOB_ID $2 $starts" >"$1/.starts"
}

# Runs a command on RANKS ranks and waits for it, through signals; sets `code`.
run_ranks() { # RANKS COMMAND...
    local n=$1
    shift
    [[ ! $asked ]] || again "stopped before the ranks started"
    if [[ ! $HEARS_SIGNALS ]]; then
        export PROMOE_ENDS=$folder/.ends-$JOB
        rm -rf "$PROMOE_ENDS"
        mkdir -p "$PROMOE_ENDS" || fail 1 "$PROMOE_ENDS: cannot be made"
        expected=$n
    fi
    slurm/launch.sh "$n" "${python[@]}" "$@" &
    pid=$! began=$SECONDS
    [[ $asked != waits ]] || forward # it came after the first line
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid" # bash keeps the status of its child
    code=$?
}

# Whether every allocated node still starts a process: Slurm itself may take minutes to notice that one is gone.
nodes_answer() {
    timeout 90 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true >/dev/null 2>&1
}

# Whether every rank has left word (slurm/task.sh) that matches PATTERN.
all_said() { # PATTERN
    local late=$((SECONDS + 60))
    while (($(grep -lsx "$1" "$PROMOE_ENDS"/* | wc -l) < expected)); do
        ((NODES > 1 && SECONDS < late)) || return # NFS may show what another node wrote a minute later
        sleep 5
    done
}

# Whether the ranks were stopped from outside and can go on: each is done, or was stopped. Not by the exit code of srun,
# which ends the others by TERM when one has crashed.
stopped() { ((code)) && [[ $PROMOE_ENDS ]] && grep -qsx stopped "$PROMOE_ENDS"/* && all_said 'stopped\|finished'; }

# Whether a TERM ended a rank before bash had read task.sh, which left no file; or one that hears signals, and heard two.
early() { ((code == 143)) && [[ ! $PROMOE_ENDS || $(find "$PROMOE_ENDS" -type f | wc -l) -lt $expected ]]; }

# Whether scancel ended the job, which waits for its processes only: Slurm would take a requeue and bring it back to life.
# It writes the same of a job that it has requeued itself, but for Restarts, or preempts, but for PreemptTime.
cancelled() {
    ask && [[ $record == *" JobState=COMPLETING Reason=None "*" Restarts=$restarts "*" PreemptTime=None "* ]]
}

# Whether the work is done, which an exit code of 0 does not say: launchers may give it when they are killed themselves.
# Scripts whose ranks leave no words look into their folder.
finished() { [[ ! $PROMOE_ENDS ]] || all_said finished; }

forget_ends() { [[ ! $PROMOE_ENDS ]] || rm -rf "$PROMOE_ENDS"; }

# Back into the queue under the same job id; dependents keep waiting.
again() { # WHY
    forget_ends
    if cancelled; then fail 85 "$1, and not requeued, because the job was cancelled; submit the same command again to go on"; fi
    case $ON_STOP in
    continue) say "$1; the next job of the chain continues" && exit 0 ;;
    stop) say "$1; submit the same command again" && exit 85 ;;
    esac
    say "$1; requeueing"
    if scontrol requeue "$JOB"; then # Slurm ends this script, whose exit code no longer counts
        sleep 60
        exit 0
    fi
    sleep 60 # a preemption may be about to do the same
    fail 85 "this cluster does not requeue; submit the same command again, or chain jobs (slurm/pipeline.sh --chain N)"
}

# The end of a batch script: success, requeue, or a failure that cancels the jobs that wait for this one.
finish() {
    if stopped; then again "stopped and saved"; fi
    if early; then again "stopped before the ranks had saved"; fi
    if ((code)) && ! cancelled && ! nodes_answer; then again "a node does not answer (exit code $code)"; fi
    if ((!code)) && ! finished; then
        code=1
        echo "error: the ranks ended with exit code 0, but not all is done; the same command continues" >&2
    fi
    ((code != 85)) || code=1 # of a rank that was stopped because another failed
    forget_ends
    say "exit code $code"
    exit "$code"
}
