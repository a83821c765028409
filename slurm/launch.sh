#!/usr/bin/env bash
# slurm/launch.sh RANKS COMMAND...: a plain srun with one task a GPU, inside an allocation (sbatch or salloc). Signals
# and exit codes go straight between Slurm and the ranks. scaling_study.py uses it too: --launch "slurm/launch.sh {world} python -u"
set -eu
ranks=$1
shift
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
per_node=${TASKS_PER_NODE:-${gpus##*:}}
if ((ranks < per_node)); then per_node=$ranks; fi
nodes=$((ranks / per_node))
if ((ranks % per_node || nodes > SLURM_JOB_NUM_NODES)); then
    echo "error: $ranks ranks do not fit $SLURM_JOB_NUM_NODES nodes of $per_node: choose a multiple of $per_node" >&2
    exit 2
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
hosts=("${hosts[@]:0:nodes}")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} LOCAL_WORLD_SIZE=$per_node
on_node=${SLURM_CPUS_ON_NODE:-${SLURM_JOB_CPUS_PER_NODE:-1}} # salloc sets the second only: 72(x2),36
cpus=$((${on_node%%[!0-9]*} / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
# since 22.05 srun does not take --cpus-per-task from the job; without --kill-on-bad-exit a dead rank leaves the others
# --mem=0: all the job has of a node, whatever the variables say
# --export: of a job submitted with --export=NONE, the ranks would get no variables
exec srun --export=ALL --mem=0 --nodelist="$(IFS=, && echo "${hosts[*]}")" --nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$per_node" \
    --distribution=block --cpus-per-task="$((cpus > 0 ? cpus : 1))" --kill-on-bad-exit=1 "$here/task.sh" "$@"
