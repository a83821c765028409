# shellcheck shell=bash
# Your cluster: sourced by every batch script, on the first node; what is exported here reaches every rank. All of it is
# commented: nothing is needed on a cluster whose shared file system holds this repository and its .venv.

# ---- Python, one of:
# source "$HOME/.bashrc" && module purge && module load python/3.11 cuda/12.8
# source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate promoe
# export PYTHON=$PWD/.venv/bin/python                       # one program; the default where it exists, else `python`
# A container: these words go before `python`, in every rank. It must see this folder, the data and the run folder.
# export PYTHON=python WRAP="apptainer exec --nv --bind $PWD,/data $HOME/promoe.sif"

# ---- network. Both libraries choose by themselves; set names only where they choose wrongly (`ip -br addr` on a node).
# export NCCL_SOCKET_IFNAME==ib0 GLOO_SOCKET_IFNAME=ib0     # NCCL: "=ib0" is exactly ib0, "ib" every name that begins so
# gloo takes the address that the node's own hostname resolves to: a line "127.0.1.1 NODE" in /etc/hosts breaks it
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5            # the InfiniBand cards beside the GPUs
# export NCCL_IB_DISABLE=1                                  # no InfiniBand: sockets
# export FI_PROVIDER=efa                                    # AWS
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET         # to look for a fault; not for production

# ---- memory and caches
# export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$USER      # home folders on NFS are slow, and shared by all ranks
# export TORCHINDUCTOR_CACHE_DIR=${TMPDIR:-/tmp}/inductor-$USER
# ulimit -n 65536                                           # shards of latents and sockets of many ranks

# ---- processors; by default a node's are shared out equally
# export OMP_NUM_THREADS=8
