#!/usr/bin/env bash
# One rank: srun's numbers under the names that torch and DeepSpeed read. launch.sh starts it, srun in every task.
set -eu
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
if ((RANK != SLURM_NODEID * LOCAL_WORLD_SIZE + LOCAL_RANK)); then
    echo "error: rank $RANK is task $LOCAL_RANK of node $SLURM_NODEID: expert-parallel groups need --distribution=block" >&2
    exit 2
fi
if [[ ${DEVICE:-} == cpu ]]; then export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu; fi
# train.py hears these as soon as Python runs; until then they would kill the rank
if [[ ${HEARS_SIGNALS:-} ]]; then trap '' TERM USR2; fi
exec "$@"
