#!/usr/bin/env bash
# Submit the scaling study: an array job a world size, on the nodes that its points need and no more.
usage() {
    cat <<'TEXT'
usage: slurm/scaling_study.sh [--dry-run]      settings are variables, as of slurm/scaling_study.sbatch

  DATA=latents slurm/scaling_study.sh                       ProMoE-XL on 8, 16, 32 GPUs x ep 1, 2, 4 x ZeRO 1, 2
  RECIPE=imagenet256_promoe_b WORLD=8,64 STAGE=1 BATCH=strong slurm/scaling_study.sh --dry-run

  --dry-run    print the sbatch commands

RECIPE WORLD EP STAGE BATCH ROUTING OUT DATA STUDY_OPTIONS   the points
GPUS_PER_NODE (8)  SBATCH_OPTIONS                            of a node; more options of sbatch
SBATCH_PARTITION, SBATCH_ACCOUNT, ...                        are read by sbatch itself

Prints a job id a world size. The same command again runs what is missing.
TEXT
}
set -euo pipefail
dry=''
while (($#)); do
    case $1 in
    --dry-run) dry=1 ;;
    -h | --help) usage && exit ;;
    *) echo "error: $1: is no option; see --help" >&2 && exit 2 ;;
    esac
    shift
done

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export PROMOE_ROOT=$PWD RECIPE=${RECIPE:-imagenet256_promoe_xl} # common.sh's defaults where variables are not set
per_node=${GPUS_PER_NODE:-8}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS_PER_NODE=$per_node: is not a number of GPUs" >&2 && exit 2; }
[[ ${PYTHON:-} || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
read -ra options <<<"${SBATCH_OPTIONS:-}"
read -ra study_options <<<"${STUDY_OPTIONS:-}"
IFS=, read -ra worlds <<<"${WORLD:-8,16,32}"

points=() # asked of all sizes before the first is submitted
for world in "${worlds[@]}"; do
    [[ $world =~ ^[1-9][0-9]*$ ]] || { echo "error: WORLD=$world: is not a number of GPUs" >&2 && exit 2; }
    if ((world > per_node && world % per_node)); then
        echo "error: WORLD=$world: does not fill nodes of $per_node GPUs; choose a multiple, or set GPUS_PER_NODE" >&2
        exit 2
    fi
    list=$("${PYTHON:-python}" benchmarks/scaling_study.py --recipe "$RECIPE" --world "$world" --ep "${EP:-1,2,4}" \
        --stage "${STAGE:-1,2}" --batch "${BATCH:-weak}" --dry-run ${DATA:+"data.path=$DATA"} "${study_options[@]}")
    points+=("$(wc -l <<<"$list")")
done
submitted=()
for i in "${!worlds[@]}"; do
    nodes=$(((worlds[i] + per_node - 1) / per_node))
    command=(sbatch --parsable --nodes="$nodes" --gpus-per-node="$per_node" --array="0-$((points[i] - 1))"
        "${options[@]}" slurm/scaling_study.sbatch)
    if [[ $dry ]]; then
        echo "world ${worlds[i]}: ${command[*]}"
        continue
    fi
    job=$(WORLD=${worlds[i]} "${command[@]}") || {
        echo "error: world ${worlds[i]} was not submitted (sbatch says why above); the others are cancelled" >&2
        if ((${#submitted[@]})); then scancel "${submitted[@]}"; fi
        exit 1
    }
    submitted+=("${job%%;*}") # a federation adds its cluster's name
    echo "world ${worlds[i]} ${job%%;*}"
done
