#!/usr/bin/env bash
# Submit encode -> train -> sample -> evaluate; each starts when the one before has succeeded, and is cancelled if it fails.
usage() {
    cat <<'TEXT'
usage: slurm/pipeline.sh [--chain N] [--dry-run]      settings are variables, as of the batch scripts it submits

  IMAGES=imagenet/train VAE=sd-vae-ft-mse DATA=latents REF=VIRTUAL_imagenet256_labeled.npz \
      INCEPTION_WEIGHTS=pt_inception-2015-12-05-6726825d.pth slurm/pipeline.sh
  RECIPE=digits NODES=1 GPUS_PER_NODE=2 NUM=1000 STEPS=50 slurm/pipeline.sh --dry-run

  --chain N    for clusters that do not requeue: N training jobs, each continuing the one before; a job after the step
               target ends at once
  --dry-run    print the sbatch commands

IMAGES              images to encode into DATA; without it DATA is trained on as it is
RECIPE RUN DATA VAE EP DS_CONFIG OVERRIDES           training
NUM CFG STEPS BATCH PRECISION REF INCEPTION_WEIGHTS  sampling at the guidance scales CFG (1.0,1.5), and scores
NODES GPUS_PER_NODE MIN_NODES                        training: --nodes=MIN_NODES-NODES --gpus-per-node
{ENCODE,SAMPLE,EVALUATE}_OPTIONS                     more words for these launchers
TRAIN_SBATCH OTHER_SBATCH                            more options of sbatch: of training, of the other stages
SBATCH_PARTITION, SBATCH_ACCOUNT, ...                are read by sbatch itself

Prints a job id a stage. The same command again continues: every stage keeps what is finished.
TEXT
}
set -euo pipefail
chain=1 dry=''
while (($#)); do
    case $1 in
    --chain) chain=${2:-} && shift "$(($# > 1))" ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit ;;
    *) echo "error: $1: is no option; see --help" >&2 && exit 2 ;;
    esac
    shift
done
[[ $chain =~ ^[1-9][0-9]*$ ]] || { echo "error: --chain=$chain: is not a number of jobs; choose 1 or more" >&2 && exit 2; }

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export PROMOE_ROOT=$PWD RECIPE=${RECIPE:-imagenet256_promoe_xl}
export RUN=${RUN:-runs/$(basename "$RECIPE" .yaml)}
# what the last stage needs is asked for now, not after days of training
for name in IMAGES VAE REF INCEPTION_WEIGHTS; do
    value=${!name:-}
    [[ $value == */* || $value == *.* ]] || continue
    [[ $dry || -e $value ]] || { echo "error: $name=$value: no such file; it would be missed later" >&2 && exit 2; }
done
if [[ ${IMAGES:-} && (! ${VAE:-} || ! ${DATA:-}) ]]; then
    echo "error: IMAGES=$IMAGES: needs VAE=DIR to encode with and DATA=DIR for the latents" >&2
    exit 2
fi

previous='' submitted=()
submit() { # STAGE OPTIONS_AND_SCRIPT...
    local stage=$1
    shift
    local command=(sbatch --parsable ${previous:+--dependency=afterok:"$previous" --kill-on-invalid-dep=yes} "$@")
    if [[ $dry ]]; then
        echo "$stage: ${command[*]}"
        previous="<$stage>"
        return
    fi
    previous=$("${command[@]}") || {
        echo "error: $stage was not submitted (sbatch says why above); the stages before it are cancelled" >&2
        if ((${#submitted[@]})); then scancel "${submitted[@]}"; fi
        exit 1
    }
    previous=${previous%%;*} # a federation adds its cluster's name
    submitted+=("$previous")
    echo "$stage $previous"
}

read -ra train_sbatch <<<"${TRAIN_SBATCH:-}"
read -ra other_sbatch <<<"${OTHER_SBATCH:-}"
if [[ ${NODES:-} ]]; then train_sbatch=("--nodes=${MIN_NODES:+$MIN_NODES-}$NODES" "${train_sbatch[@]}"); fi
if [[ ${GPUS_PER_NODE:-} ]]; then
    train_sbatch+=("--gpus-per-node=$GPUS_PER_NODE")
    other_sbatch=("--gpus-per-node=$GPUS_PER_NODE" "${other_sbatch[@]}")
fi
if [[ ${IMAGES:-} ]]; then OUT=$DATA MIN_NODES='' submit encode "${other_sbatch[@]}" slurm/encode.sbatch; fi
if ((chain == 1)); then
    submit train "${train_sbatch[@]}" slurm/promoe_xl.sbatch
else
    for ((i = 1; i <= chain; i++)); do
        on_stop=$( ((i < chain)) && echo continue || echo stop)
        ON_STOP=$on_stop submit "train-$i" --no-requeue "${train_sbatch[@]}" slurm/promoe_xl.sbatch
    done
fi
unset MIN_NODES
submit sample "${other_sbatch[@]}" slurm/sample.sbatch
submit evaluate "${other_sbatch[@]}" slurm/evaluate.sbatch
