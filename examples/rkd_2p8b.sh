#!/usr/bin/env bash
#SBATCH --job-name=rkd_2p8b
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
# Reverse distillation (RKD), the paper's other baseline: salt_2p8b.sh with a teacher that stays to the end. Options, flags and environment
# as in salt_2p8b.sh.
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
RUN_DIR=${RUN_DIR:-runs/rkd_2p8b}
source examples/launch.sh

train --config examples/model_2p8b.yaml "${precision[@]}" --data-path "${data[@]}" \
    --teacher-load "${TEACHER:-runs/teacher_1p5b}" "${teacher_precision[@]}" --teacher-micro-batch-size 8 \
    --kd-steps "${KD_STEPS:-208000}" --kd-weight "${KD_WEIGHT:-0.667}" --kd-teacher-temperature "${KD_TEMPERATURE:-0.25}" \
    --straggler-report-interval 100 "$@"
