#!/usr/bin/env bash
#SBATCH --job-name=salt_2p8b
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
# SALT: a 2.8B student with a 1.5B teacher. This is our reading of the setting of arXiv 2410.18779: vocabulary 256K, 1280 tokens, batches of
# 2048, 208K steps. The teacher helps in the first 36K steps, with weight 0.667 and temperature 0.25. Then it leaves at once.
#
#     bash examples/salt_2p8b.sh          # on the login node: checks data, teacher, space, versions, memory of the GPUs
#     sbatch examples/salt_2p8b.sh        # the run; the same command again continues it
#     TEACHER=/shared/teacher sbatch --nodes=4 examples/salt_2p8b.sh --kd-steps 20000
#     RUN_DIR=runs/salt_let_2p8b sbatch examples/salt_2p8b.sh --guide both --let-steps 20000      # hidden-state guidance too (LET)
#     RUN_DIR=runs/let_2p8b sbatch examples/salt_2p8b.sh --guide hidden --let-steps 20000         # LET alone, with a bfloat16 teacher
#
# Submit it from the repository's root. Options of sbatch stand before the script, flags of the trainer after it. Both win over this file.
# It needs the data (preprocess.sh) and a teacher (teacher_1p5b.sh). pipeline.sh makes everything in its order.
#
# Open in the paper: the temperature. We divide the teacher's logits by it, so 0.25 sharpens; as an exponent it would flatten. We could not
# read weight and temperature again in the paper's text. Nothing has been run at this size.
#
# Departures from the paper: a causal language model instead of UL2's mixture; AdamW instead of Adafactor, at a peak of 3e-4 instead of
# 1e-3; shapes of our own (the paper gives parameter counts), with SwiGLU, RMSNorm and rotary positions; FP8 products (FP8=0: bfloat16).
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
RUN_DIR=${RUN_DIR:-runs/salt_2p8b}
source examples/launch.sh

train --config examples/model_2p8b.yaml "${precision[@]}" --data-path "${data[@]}" \
    --teacher-load "${TEACHER:-runs/teacher_1p5b}" "${teacher_precision[@]}" --teacher-micro-batch-size 8 \
    "${soft_labels[@]}" --straggler-report-interval 100 "$@"
