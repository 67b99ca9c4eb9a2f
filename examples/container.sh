#!/usr/bin/env bash
# How a command gets into a container; launch.sh and pipeline.sh source this. It sets
#
#   container   options of srun: pyxis starts the tasks of a step inside an image
#   wrap        words before a command: Apptainer runs one command inside an image; then what WRAP says
#   PYTHON      the interpreter: that of .venv, or python3 in a container and where there is no .venv
#
# CONTAINER is an image. A .sif file, or a directory that ends in /, is Apptainer's. Anything else is pyxis's: image.sqsh, or a
# registry's name.
# CONTAINER_MOUNTS lists HOST:CONTAINER paths, with commas between them; by default this directory alone.
# WRAP is a command that runs a command: WRAP='numactl -l'. It runs inside the container.
#
# shellcheck disable=SC2034 # the scripts that source this use the variables
container=() wrap=()
read -ra wrap <<<"${WRAP:-}"
case ${CONTAINER:-} in
    '') [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python ;;
    *.sif | */) wrap=(apptainer exec --nv --bind "${CONTAINER_MOUNTS:-$PWD}" --pwd "$PWD" "$CONTAINER" "${wrap[@]}") ;;
    *) container=(--container-image="$CONTAINER" --container-mounts="${CONTAINER_MOUNTS:-$PWD}" --container-workdir="$PWD") ;;
esac
PYTHON=${PYTHON:-python3}
