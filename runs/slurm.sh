#!/usr/bin/env bash
# One training command on all machines of a Slurm job, one torchrun on each; see docs/training.md.
#     sbatch --nodes 2 --gpus-per-node 8 runs/slurm.sh scripts.base_train --input data/text --depth 20
# The checkout, its .venv and NANOCHAT_BASE_DIR are on a file system that all machines see. A job that was ended goes on
# where it was when the same line is given again; with --dependency singleton it can be given several times at once.
#SBATCH --job-name nanochat
#SBATCH --ntasks-per-node 1
#SBATCH --open-mode append
#SBATCH --requeue
#SBATCH --signal TERM@180
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the checkout}"
if [ $# -eq 0 ]; then
    echo "error: give the script to run: sbatch runs/slurm.sh scripts.base_train --input data/text --depth 20" >&2
    exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # after a restart, ranks must not meet where the dead ones were
# --signal tells the run three minutes before the job's time is over; torchrun gives it two of them to save
exec srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
    --max-restarts 3 --shutdown-timeout 120 -m "$@" --resume auto
