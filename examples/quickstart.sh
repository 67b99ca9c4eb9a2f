#!/usr/bin/env bash
# From text to a trained model on two CPU ranks, in minutes and without a network. Everything lands in runs/quickstart, which
# each run starts anew. `make quickstart` runs this; by hand: PYTHON=python3 SHORT=1 bash examples/quickstart.sh [pretrain flags]
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
RUN=runs/quickstart
DATA="$RUN/data"
export CUDA_VISIBLE_DEVICES=                   # two ranks on the CPU, whatever this machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core a rank
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

if [ "${SHORT:-0}" = 1 ]; then
    set -- --train-iters 150 --eval-interval 50 "$@"
    below=0.90
else
    below=0.75
fi

step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

rm -rf "$RUN"

step "text of this Python installation"
"$PYTHON" tools/python_corpus.py --output-dir "$DATA"

step "tokenizer"
"$PYTHON" tools/train_tokenizer.py --input "$DATA/train.jsonl" --output "$DATA/tokenizer.model" --vocab-size 4096

step "tokens"
for split in train held_out; do
    "$PYTHON" tools/preprocess_data.py --input "$DATA/$split.jsonl" --output-prefix "$DATA/$split" --append-eod --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model"
done

step "training on two ranks"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_salt.pretrain --config examples/quickstart.yaml "$@"

step "text from the model"
"$PYTHON" tools/generate_text.py --load "$RUN/checkpoints" --prompt 'def read_' --max-new-tokens 80 --temperature 0.7

step "what came of it"
"$PYTHON" tools/report.py --run "quickstart=$RUN/checkpoints/train.jsonl" --output "$RUN/loss.png" \
    --unigram-of "$DATA/held_out_text_document" --below-unigram "$below"

step "done: $RUN has the data, the checkpoint, the log and the picture"
