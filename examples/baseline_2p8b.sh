#!/usr/bin/env bash
#SBATCH --job-name=baseline_2p8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# The student of salt_2p8b.sh without a teacher, on the same data in the same order. Options, flags and environment as in salt_2p8b.sh.
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
RUN_DIR=${RUN_DIR:-runs/baseline_2p8b}
source examples/launch.sh

train --config examples/model_2p8b.yaml "${precision[@]}" --data-path "${data[@]}" --straggler-report-interval 100 "$@"
