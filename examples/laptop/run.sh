#!/usr/bin/env bash
# The laptop study, piece by piece: the data if they are not there, then each piece by tools/study.py, two runs at a time with one
# thread each. It can be stopped at any time (Ctrl-C); the next start goes on. The report of a piece, with its definition and the machine's
# class in it, and the logs of its runs are copied to examples/laptop/results. `make laptop-study` runs this script. By hand:
#
#     PIECES="1_learning_rate 3_main" PYTHON=python3 bash examples/laptop/run.sh [flags of tools/study.py]
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.."

PYTHON="${PYTHON:-python3}"
PIECES="${PIECES:-1_learning_rate 2_choices 2_scores 3_main 4_more_tokens 5_teacher_sizes 6_beyond_choices 6_beyond_salt}"
DATA=runs/laptop/data
RESULTS=examples/laptop/results
export CUDA_VISIBLE_DEVICES=                   # CPU, whatever this machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the same sums on every machine, and two runs on two cores
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

PYTHON="$PYTHON" bash examples/laptop/prepare.sh
for piece in $PIECES; do
    run="runs/laptop/$piece"
    printf '\n== %s (after %d s)\n' "$piece" "$SECONDS"
    status=0 # 1: a run failed, such as one with too large a learning rate; the report shows it
    "$PYTHON" tools/study.py "examples/laptop/$piece.yaml" --local 2 "$@" || status=$?
    [ "$status" -le 1 ] || exit "$status"
    [ -d "$run/report" ] || continue # --dry-run
    if [ "$piece" = 3_main ]; then
        # What a run evaluates while it trains is a part of each set. This is the whole of them, once, for the runs of the primary
        # question. A later start adds what is missing.
        ended=("$run"/runs/{baseline,salt}/seed_*/latest_checkpointed_iteration.txt)
        [ "${#ended[@]}" = 0 ] || "$PYTHON" tools/evaluate.py --load "${ended[@]%/*}" --output "$run/report/whole_sets.json" \
            --data "test=$DATA/test_text_document" "prose=$DATA/prose_text_document" "python=$DATA/python_text_document"
    fi
    rm -rf "$RESULTS/$piece"
    mkdir -p "$RESULTS/$piece"
    cp "$run"/report/* "$RESULTS/$piece/"
    (cd "$run" && find . -name train.jsonl | sort) |
        tar --create --gzip --file "$RESULTS/$piece/logs.tar.gz" --directory "$run" --files-from -
done
