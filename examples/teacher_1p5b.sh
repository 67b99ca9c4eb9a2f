#!/usr/bin/env bash
#SBATCH --job-name=teacher_1p5b
#SBATCH --nodes=4
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
# The teacher of salt_2p8b.sh: 1.5B parameters, trained plainly on as many tokens. It keeps its checkpoint of step 26,000 for score.sh.
# Options, flags and environment as in salt_2p8b.sh.
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
RUN_DIR=${RUN_DIR:-runs/teacher_1p5b}
source examples/launch.sh

train --config examples/model_1p5b.yaml "${precision[@]}" --data-path "${data[@]}" --save-at "${EARLY_STEP:-26000}" \
    --straggler-report-interval 100 "$@"
