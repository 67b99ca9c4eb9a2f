#!/usr/bin/env bash
# SALT from end to end on two CPU ranks, in minutes and without a network:
#
#   text       the source and the help of this Python installation
#   tokens     a tokenizer trained on that text, and the text as token ids
#   teacher    a small model
#   salt       a larger student, which learns from the data and from the teacher in its first steps
#   salt_ds    the same, with the samples of these first steps selected by scores of an early form of the teacher
#   plain      the same student without a teacher: same seed, same number of steps
#
# Everything is written to runs/quickstart; each run deletes what the last one left. `make quickstart` runs this script.
# By hand, with flags for all four trainings:
#
#     PYTHON=python3 SHORT=1 bash examples/quickstart.sh [pretrain flags]
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
RUN=runs/quickstart
DATA="$RUN/data"
export CUDA_VISIBLE_DEVICES=                   # two ranks on the CPU, whatever this machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core a rank
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

# The long form shows a direction: SALT ends below plain + 0.05. It is one seed, and one seed is no evidence. Every run must end
# clearly below the unigram entropy, the loss of a model that knows no context. The short form only shows that everything works.
kd_steps=60
early=80
scored=(--sample 0.2) # several times as many windows as stage 1 reads
asked=(--below-unigram 0.85 --below salt:plain --below-margin 0.05)
if [ "${SHORT:-0}" = 1 ]; then
    set -- --train-iters 60 --eval-interval 30 --eval-iters 8 "$@"
    kd_steps=15
    early=30
    scored=()
    asked=(--below-unigram 0.97)
fi

step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }
on_two_ranks() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 "$@"; }
pretrain() { on_two_ranks -m megatron_salt.pretrain "$@"; }

rm -rf "$RUN"

step "text of this Python installation"
"$PYTHON" tools/python_corpus.py --output-dir "$DATA"
if [ "${SHORT:-0}" = 1 ]; then # a tenth of the documents
    "$PYTHON" -c 'import sys; lines = open(sys.argv[1]).readlines(); open(sys.argv[1], "w").writelines(lines[::10])' "$DATA/train.jsonl"
fi

step "tokenizer"
"$PYTHON" tools/train_tokenizer.py --input "$DATA/train.jsonl" --output "$DATA/tokenizer.model" --vocab-size 2048

step "tokens"
for split in train held_out; do
    "$PYTHON" tools/preprocess_data.py --input "$DATA/$split.jsonl" --output-prefix "$DATA/$split" --append-eod --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model"
done

step "teacher: two data-parallel replicas"
pretrain --config examples/quickstart_teacher.yaml --save-at "$early" "$@"

# The teacher has no pipeline. Each rank holds a whole replica of it, which reads half of every batch, four samples at once.
# So both ranks have the same work, and exchange nothing but hidden states.
salt=(--config examples/quickstart.yaml
    --teacher-load "$RUN/teacher" --teacher-tensor-model-parallel-size 1 --teacher-pipeline-model-parallel-size 1
    --teacher-micro-batch-size 4 --kd-steps "$kd_steps" --kd-weight 0.667 --kd-teacher-temperature 0.25)
step "salt: two pipeline stages, and on each rank a replica of the teacher for $kd_steps steps"
pretrain "${salt[@]}" --save "$RUN/salt" "$@"

printf -v early_teacher '%s/iter_%07d' "$RUN/teacher" "$early"
step "scores: the teacher as it was after $early steps reads windows of the training data"
on_two_ranks tools/score_data.py --teacher-load "$early_teacher" --data-path "$DATA/train_text_document" "${scored[@]}" \
    --output "$RUN/scores"

# Two readings of the paper's score: tokens outside the teacher's top ten count as 0 (median_zeroed_10), or are left out
# (median_dropped_10). The first is 0 for most windows of a teacher this small. No score has beaten a random choice yet.
step "selection: the half with the highest scores, each text once"
"$PYTHON" tools/select_data.py --scores "$RUN/scores" --score median_dropped_10 --fraction 0.5 --exclude-duplicates --examples 1 --output "$RUN/selection"

step "salt_ds: stage 1 draws from the selection, stage 2 from what stage 1 did not see"
pretrain "${salt[@]}" --stage1-selection "$RUN/selection.npy" --stage2-data unseen --save "$RUN/salt_ds" "$@"

step "plain: the student without a teacher"
pretrain --config examples/quickstart.yaml "$@"

step "text that the student of salt writes"
"$PYTHON" tools/generate_text.py --load "$RUN/salt" --prompt 'def read_' --max-new-tokens 80 --temperature 0.7

step "the curves, a table and a picture (one seed: a direction, no evidence)"
"$PYTHON" tools/report.py --run "plain=$RUN/plain/train.jsonl" "salt=$RUN/salt/train.jsonl" "salt_ds=$RUN/salt_ds/train.jsonl" \
    "teacher=$RUN/teacher/train.jsonl" --output "$RUN/loss.png" --unigram-of "$DATA/held_out_text_document" "${asked[@]}"

step "done: $RUN has the data, scores and selection, the checkpoints, their logs and the pictures"
