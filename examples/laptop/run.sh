#!/usr/bin/env bash
# The laptop study, piece by piece: the data if they are not there, then each piece by tools/study.py, two runs at a time with one
# thread each. It can be stopped at any time (Ctrl-C); the next start goes on. `make laptop-study` runs this script. By hand:
#
#     PIECES="1_learning_rate 3_main" PYTHON=python3 bash examples/laptop/run.sh [flags of tools/study.py]
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.."

PYTHON="${PYTHON:-python3}"
PIECES="${PIECES:-1_learning_rate 2_choices 2_scores 3_main 4_more_tokens 5_teacher_sizes}"
DATA=runs/laptop/data
export CUDA_VISIBLE_DEVICES=                   # CPU, whatever this machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the same sums on every machine, and two runs on two cores
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

PYTHON="$PYTHON" bash examples/laptop/prepare.sh
for piece in $PIECES; do
    printf '\n== %s (after %d s)\n' "$piece" "$SECONDS"
    "$PYTHON" tools/study.py "examples/laptop/$piece.yaml" --local 2 "$@"
done

# What a run evaluates while it trains is a part of each set. This is the whole of them, once, for the runs of the primary question.
# A later start adds what is missing.
ended=(runs/laptop/3_main/runs/{baseline,salt}/seed_*/latest_checkpointed_iteration.txt)
if [[ " $PIECES " == *" 3_main "* && ${#ended[@]} -gt 0 ]]; then
    "$PYTHON" tools/evaluate.py --load "${ended[@]%/*}" --output runs/laptop/3_main/whole_sets.json \
        --data "test=$DATA/test_text_document" "prose=$DATA/prose_text_document" "python=$DATA/python_text_document"
fi
