#!/usr/bin/env bash
# One rank: srun's numbers under the names that torch and DeepSpeed read. launch.sh starts it, srun in every task.
set -eu
told='' code=0
if [[ ${HEARS_SIGNALS:-} ]]; then
    trap '' TERM USR2 # train.py hears them as soon as Python runs; until then they would kill the rank
elif [[ ${PROMOE_ENDS:-} ]]; then
    trap 'told=1' TERM # bash keeps waiting
fi

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
if ((RANK != SLURM_NODEID * LOCAL_WORLD_SIZE + LOCAL_RANK)); then
    echo "error: rank $RANK is task $LOCAL_RANK of node $SLURM_NODEID: expert-parallel groups need --distribution=block" >&2
    exit 2
fi
if [[ ${DEVICE:-} == cpu ]]; then export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu; fi
[[ ${PROMOE_ENDS:-} ]] || exec "$@"

# The ranks of other jobs do not agree on how they end: each leaves word, and common.sh asks whether it has them all.
# That Slurm sends TERM, also to the others after a rank has died, is no failure of this one; one that dies of KILL, a
# crash, or a TERM of its own alone leaves no word.
: >"$PROMOE_ENDS/$RANK"
if [[ $told ]]; then code=143; else "$@" || code=$?; fi
# Slurm signals one process after the other: this one may see the rank die of a TERM before its own comes
if ((code == 143)); then for ((i = 0; i < 30; i++)); do [[ $told ]] || sleep 0.1 || :; done; fi
if [[ $told && " 130 143 " == *" $code "* ]]; then code=85; fi
case $code in
0) echo finished >"$PROMOE_ENDS/$RANK" ;;
85) echo stopped >"$PROMOE_ENDS/$RANK" ;;
esac
exit "$code"
