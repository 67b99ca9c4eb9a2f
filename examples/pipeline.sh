#!/usr/bin/env bash
# The whole chain as Slurm jobs that wait for each other: text to tokens, a teacher, its scores, a selection, and the student by SALT_DS.
# SELECT=0 trains the student by SALT, without scores and selection. The script says what it submitted; with DRY_RUN=1 it only says what it
# would submit. If a job fails, the jobs after it are cancelled.
#
#     INPUT='corpus/*.jsonl.zst' bash examples/pipeline.sh --account=us --partition=h100
#
# No score has beaten a random selection in our runs yet: SELECT_FLAGS='--rule random' makes one. To score everything costs 17.9% of the
# student's FLOPs; SCORE_FLAGS='--sample 0.35' costs 6.2%.
#
# The arguments are sbatch options of every job. CPU_OPTIONS, TEACHER_OPTIONS, SCORE_OPTIONS and STUDENT_OPTIONS come after them, each for
# its own jobs. TEACHER_FLAGS, SCORE_FLAGS, SELECT_FLAGS and STUDENT_FLAGS are flags of the programs. The environment is that of the scripts.
set -euo pipefail
cd "${REPO:-$(dirname "$0")/..}"
export OUTPUT=${OUTPUT:-data} NAME=${NAME:-pile} SHARDS=${SHARDS:-16} SCORES=${SCORES:-runs/scores} SELECTION=${SELECTION:-runs/selection}
export TEACHER=${TEACHER:-runs/teacher_1p5b} TOKENIZER=${TOKENIZER:-data/tokenizer.model} DATA=$OUTPUT/${NAME}_text_document
source examples/container.sh
[ ${#container[@]} = 0 ] || container=(srun "${container[@]}") # a job's own shell is outside the container
inside=("${container[@]}" "${wrap[@]}" "$PYTHON")
everywhere=("$@")
before=() # options of jobs that have no script with #SBATCH lines
unset RUN_DIR # each job has one of its own

words() { # words VARIABLE: split its value into `list`
    read -ra list <<<"${!1:-}"
}

submit() { # submit NAME AFTER OPTIONS_VARIABLE WHAT...: submit one job and set `job` to its number
    local name=$1 after=$2 list=()
    words "$3"
    local command=(sbatch --parsable "${before[@]}" "${everywhere[@]}" "${list[@]}" ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "${@:4}")
    if [ "${DRY_RUN:-0}" = 1 ]; then job=$name; else job=$("${command[@]}"); job=${job%%;*}; fi
    printf '%-10s job %-12s after %-12s %s\n' "$name" "$job" "${after:--}" "${command[*]}"
}

compgen -G "${INPUT:-corpus/*.jsonl.zst}" >/dev/null || { echo "error: INPUT ${INPUT:-corpus/*.jsonl.zst} matches no file; set INPUT='corpus/*.jsonl' or where your text is" >&2; exit 2; }
[ -f "$TOKENIZER" ] || { echo "error: TOKENIZER $TOKENIZER is not there; tools/train_tokenizer.py makes one" >&2; exit 2; }

submit_tool() { # submit_tool NAME AFTER COMMAND
    local before=(--nodes=1 --ntasks=1 --requeue --open-mode=append "--output=%x-%j.log")
    submit "$1" "$2" CPU_OPTIONS --job-name="$1" --wrap "$3"
}

submit preprocess "" CPU_OPTIONS --array="0-$((SHARDS - 1))" examples/preprocess.sh
printf -v parts "'%s-*-of-%05d_text_document'" "$OUTPUT/$NAME" "$SHARDS"
submit_tool merge "$job" "${inside[*]} tools/merge_datasets.py --overwrite --input $parts --output-prefix $DATA"
merged=$job
words TEACHER_FLAGS
submit teacher "$merged" TEACHER_OPTIONS --export="ALL,RUN_DIR=$TEACHER" examples/teacher_1p5b.sh "${list[@]}"
teacher=$job
words STUDENT_FLAGS
student_flags=("${list[@]}")
if [ "${SELECT:-1}" = 0 ]; then
    submit salt "$teacher" STUDENT_OPTIONS --export="ALL,RUN_DIR=${STUDENT:-runs/salt_2p8b}" examples/salt_2p8b.sh "${student_flags[@]}"
    exit
fi
words SCORE_FLAGS
submit score "$teacher" SCORE_OPTIONS --array="0-$((SHARDS - 1))" examples/score.sh "${list[@]}"
select="${inside[*]} tools/select_data.py --overwrite --scores $SCORES --output $SELECTION --score median_dropped_10 --fraction 0.5 --valid-share 0.0005 ${SELECT_FLAGS:-}"
submit_tool select "$job" "$select"
submit salt_ds "$job" STUDENT_OPTIONS --export="ALL,RUN_DIR=${STUDENT:-runs/salt_ds_2p8b}" examples/salt_ds_2p8b.sh "${student_flags[@]}"
