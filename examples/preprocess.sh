#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#
# Text to tokens on CPUs. The files are divided into SHARDS parts; each array element does one. --array names the parts to do. A killed
# element continues where it was. `sbatch --array=3 examples/preprocess.sh` does one part again. Then merge the parts (pipeline.sh does it
# too):
#
#     python tools/merge_datasets.py --input 'data/pile-*-of-00016_text_document' --output-prefix data/pile_text_document
#
# INPUT: files or patterns. TOKENIZER: a SentencePiece model (tools/train_tokenizer.py makes one of 256,000 ids).
cd "${REPO:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}" && [ -f examples/launch.sh ] || { echo "submit from the repository's root, or set REPO"; exit 2; }
OUTPUT=${OUTPUT:-data} NAME=${NAME:-pile} SHARDS=${SHARDS:-16}
RUN_DIR=${RUN_DIR:-runs/preprocess-$NAME}
source examples/launch.sh

run_tool "$PYTHON" tools/preprocess_data.py --input "${INPUT:-corpus/*.jsonl.zst}" --output-prefix "$OUTPUT/$NAME" --append-eod --resume \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "${TOKENIZER:-data/tokenizer.model}" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" --shard "${SLURM_ARRAY_TASK_ID:-0}/$SHARDS" "$@"
