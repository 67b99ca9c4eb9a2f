#!/usr/bin/env bash
#SBATCH --job-name=salt_8p6b
#SBATCH --nodes=16
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
# SALT with an 8.6B student and a 2.8B teacher (baseline_2p8b.sh trains it). The student is split over four GPUs of a node. Each of them has
# a whole teacher, which takes a fourth of the microbatches. Options, flags and environment as in salt_2p8b.sh.
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
RUN_DIR=${RUN_DIR:-runs/salt_8p6b}
source examples/launch.sh

train --config examples/model_8p6b.yaml "${precision[@]}" --data-path "${data[@]}" \
    --teacher-load "${TEACHER:-runs/baseline_2p8b}" "${teacher_precision[@]}" --teacher-micro-batch-size 4 \
    "${soft_labels[@]}" --straggler-report-interval 100 "$@"
