#!/usr/bin/env bash
# The data of the laptop study: text, a tokenizer of 4,096 pieces that saw the training text alone, and tokens of five sets.
# By hand, with flags of corpus.py, such as text of your own:
#
#     PYTHON=python3 bash examples/laptop/prepare.sh --documentation my_docs.jsonl.zst --prose essays.jsonl
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON="${PYTHON:-python3}"
TEXT=runs/laptop/text
DATA=runs/laptop/data
export CUDA_VISIBLE_DEVICES=

if [ -e "$DATA/python_text_document.idx" ]; then
    echo "$DATA is there; remove it for other text"
    exit 0
fi
"$PYTHON" examples/laptop/corpus.py --output-dir "$TEXT" --overwrite "$@"
"$PYTHON" tools/train_tokenizer.py --input "$TEXT/train.jsonl" --output "$DATA/tokenizer.model" --vocab-size 4096 --overwrite
for name in train validation test prose python; do # the last of them is what tells that all are there
    "$PYTHON" tools/preprocess_data.py --input "$TEXT/$name.jsonl" --output-prefix "$DATA/$name" --append-eod --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" --overwrite
done
