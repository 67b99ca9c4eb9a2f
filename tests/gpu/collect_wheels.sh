#!/usr/bin/env bash
# Collects the wheels that tests/gpu/first_run.py needs beside PyTorch, for a machine without a network.
#
#     bash tests/gpu/collect_wheels.sh [FOLDER]     default: .whl, which git ignores
#     BARE=1 bash tests/gpu/collect_wheels.sh       also what an environment with PyTorch alone lacks
#
# There, once:  python3 -m pip install --no-index --no-deps --target .site .whl/*.whl
#               PYTHONPATH=.site python3 tests/gpu/first_run.py OUT
# The wheels are for Python 3.12 on Linux x86_64; the releases are those of constraints-py312.txt. PYTHON: any Python with pip.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.whl}
names=(megatron-core tyro docstring-parser typeguard msgspec zstandard)
if [ "${BARE:-0}" = 1 ]; then
    names+=(numpy packaging psutil pyyaml tokenizers tqdm typing-extensions)
fi
wanted=(liger-kernel==0.8.5)  # the rival of the output head; where it is missing, its row says so
for name in "${names[@]}"; do
    wanted+=("$(grep "^$name==" constraints-py312.txt)")
done
platforms=()
for glibc in 28 27 17 12 5; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" "${wanted[@]}"
size=$(du -sm "$folder" | cut -f 1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $size MiB"
test "$size" -le 60 || { echo "error: $folder is larger than 60 MiB" >&2; exit 1; }
