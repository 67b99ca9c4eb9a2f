#!/usr/bin/env bash
#SBATCH --job-name=score
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#
# Scores for salt_ds_2p8b.sh: an early checkpoint of the teacher reads every window of the training data. The data has SHARDS parts; each
# array element scores one. --array names the parts to do. A killed element continues where it was. `sbatch --array=3 examples/score.sh`
# does one part again. Then
#
#     python tools/select_data.py --scores runs/scores --output runs/selection --score median_dropped_10 --fraction 0.5 --valid-share 0.0005
#
# All windows cost 17.9% of salt_2p8b.sh's FLOPs. `sbatch examples/score.sh --sample 0.35` scores a random 0.35 of them for 6.2%, twice
# what stage 1 visits; --fraction 0.5 is then half of those. No score has beaten a random selection in our runs yet: make one with
# --rule random too, and compare.
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
OUTPUT=${SCORES:-runs/scores} SHARDS=${SHARDS:-16}
RUN_DIR=${RUN_DIR:-$OUTPUT.job}
source examples/launch.sh

printf -v early '%s/iter_%07d' "${TEACHER:-runs/teacher_1p5b}" "${EARLY_STEP:-26000}"
run_tool "$PYTHON" tools/score_data.py "${device[@]}" --teacher-load "$early" --data-path "${data[@]}" --output "$OUTPUT" --seq-length "${SEQ_LENGTH:-1280}" \
    --micro-batch-size 16 --shard "${SLURM_ARRAY_TASK_ID:-0}/$SHARDS" "$@"
