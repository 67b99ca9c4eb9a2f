#!/usr/bin/env bash
# What all job scripts share. A script sources this file and ends with `train FLAGS...` or `run_tool COMMAND...`. These do not return.
#
# srun starts one task a GPU. There is no torchrun, for three reasons:
# - Slurm's signals reach the trainer itself, once, and it has all of KillWait to save. torchrun kills its workers 30 s after SIGTERM.
# - Ranks lie in the order of Slurm's nodes. A rendezvous gives ranks in the order of arrival.
# - One loop, below, restarts whatever died or hangs. There is no second way to restart.
#
# A run restarts
# - inside the job, when a process dies or hangs;
# - by `scontrol requeue`, when the time limit is near (--signal=B:USR1@...);
# - by Slurm, after preemption, `scontrol requeue`, or the loss of a node;
# - without a host that the trainer finds unfit (a dead GPU, a broken installation): it is added to the job's ExcNodeList.
# Each start resumes from the newest whole checkpoint. The trainer writes one word into a file: done, left, refused, ... That word decides
# what happens next, never an exit status. The file has a new name at each start. More than MAX_RESTARTS starts in a row without a new
# checkpoint end the job.
#
# For your site, by environment (docs/cluster.md has the table): PYTHON, CONTAINER, CONTAINER_MOUNTS, WRAP, RUN_DIR, DATA, FP8, GPU,
# DEVICE, MAX_RESTARTS, PAUSE, HANG_MINUTES, LEAVE_SECONDS, and whatever torch and NCCL read.
#
# shellcheck disable=SC2034 # precision, teacher_precision, soft_labels, device and data are for the scripts
set -uo pipefail

source examples/container.sh
MAX_RESTARTS=${MAX_RESTARTS:-3}
HANG_MINUTES=${HANG_MINUTES:-30}    # longer than --distributed-timeout-minutes (10), after which a stuck collective ends by itself;
                                    # and longer than start-up, any evaluation and any save, for these take no step
PAUSE=${PAUSE:-20}                  # seconds before a start inside the job, more each time: Slurm needs time to see that a node is gone
LEAVE_SECONDS=${LEAVE_SECONDS:-240} # for the save after SIGUSR1; less than the seconds in --signal
RESTARTS=${SLURM_RESTART_COUNT:-0}
ELEMENT=${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # so that stage 2 can use the teacher's memory
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4} # a rank; torch would take one for each core, up to 32
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}          # keeps the last collectives,
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} # and writes them when one times out
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not read the other name

# FP8 in the layers of the student and of the teacher, for GPUs that have it (H100 and later); FP8=0 for A100.
precision=() teacher_precision=() data=()
device=(--device "${DEVICE:-cuda}") # no rank falls back to the CPU
if [ "${FP8:-1}" != 0 ]; then
    precision=(--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe tensorwise)
    teacher_precision=(--teacher-fp8-format hybrid --teacher-fp8-recipe tensorwise)
fi
# The soft labels of stage 1. Hidden-state guidance alone has none, and its teacher no FP8.
soft_labels=(--kd-steps "${KD_STEPS:-36000}" --kd-weight "${KD_WEIGHT:-0.667}" --kd-teacher-temperature "${KD_TEMPERATURE:-0.25}")
case " $* " in *" --guide hidden "* | *" --guide=hidden "*) soft_labels=() teacher_precision=() ;; esac
# The GPU that the login node's check plans for, by its name for --gpu; GPU= leaves memory and time out.
GPU=${GPU-$([ "${FP8:-1}" != 0 ] && echo h100-80 || echo a100-80)}
[ "${DEVICE:-cuda}" = cuda ] || GPU=''
read -ra data <<<"${DATA:-data/pile_text_document}" # one prefix, or weights and prefixes

say() { printf '%(%F %T)T | %s\n' -1 "$*"; }
stop() { say "error: $1"; exit "${2:-1}"; }

train() { # train FLAGS...: the trainer, until it is done
    local flag
    for flag in "$@"; do
        case $flag in --save | --save=*) stop "give RUN_DIR=DIRECTORY instead of --save: logs and restarts need it too" 2 ;; esac
    done
    case " $* " in *" --load "* | *" --load="*) ;; *) set -- "$@" --load "$RUN_DIR" ;; esac
    command=("$PYTHON" -m megatron_salt.pretrain "${device[@]}" "$@" --save "$RUN_DIR" --exit-signal-handler)
    if [ -z "${SLURM_JOB_ID:-}" ]; then # on the login node: check what can be checked without GPUs
        local ranks=${RANKS:-$(ranks_of_header)}
        exec "${wrap[@]}" "${command[@]}" --dry-run "$ranks" ${GPU:+--gpu "$GPU"}
    fi
    listens=1
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) # ranks on a node, for the host memory of a save
    launch
}

run_tool() { # run_tool COMMAND...: a tool, started again where it was killed, until it is done
    [ -n "${SLURM_JOB_ID:-}" ] || stop "start this with sbatch: sbatch $0" 2
    command=("$@")
    listens=0
    launch
}

later_flags() { # later_flags FLAGS...: sets `later` to the flags of a later start, which goes on from this run's own checkpoints
    later=()
    while [ $# -gt 0 ]; do
        case $1 in
            --load) shift ;;
            --load=* | --finetune | --new-data | --no-load-optim | --no-load-rng) ;; # flags that begin a run from another run's checkpoint
            *) later+=("$1") ;;
        esac
        shift
    done
    later+=(--load "$RUN_DIR")
}

goes_on() { # true if this job has saved: then --load of another run's checkpoint is no longer needed
    local file=$logs/began$ELEMENT.$SLURM_JOB_ID
    if [ "$RESTARTS/$attempt" = 0/1 ]; then progress >"$file"; fi
    [ -f "$file" ] && [ "$(cat "$file")" != "$(progress)" ]
}

launch() { # run `command` on all tasks, until it is done
    logs=$RUN_DIR/logs leaving='' left_at='' attempt=0 unsaved=0 unfit=''
    mkdir -p "$logs" || stop "RUN_DIR $RUN_DIR cannot be written" 2
    trap 'leaving=${leaving:-USR1} left_at=${left_at:-$SECONDS}' USR1
    trap 'leaving=TERM left_at=${left_at:-$SECONDS}' TERM
    report
    [ "$listens$RESTARTS" != 10 ] || preflight
    while [ -z "$leaving" ]; do
        attempt=$((attempt + 1))
        guard
        if [ "$listens" = 1 ] && goes_on; then later_flags "${command[@]}"; command=("${later[@]}"); fi
        start
        follow
        read -r word at reason 2>/dev/null <"$outcome" || word=died
        case $word in
            done) say "done: step $at, $reason"; exit 0 ;;
            refused) stop "refused, and not started again: $reason" 2 ;;
            nonfinite) stop "not finite, and not started again: $reason" 4 ;;
            unsaved)
                if [ "$listens" = 0 ] && [ -n "$leaving" ]; then say "the tool left before it was done; it goes on when it is started again"; break; fi
                unsaved=$((unsaved + 1))
                [ "$unsaved" = 1 ] || stop "the last of the work could not be saved, twice: $reason" 3
                say "the last of the work could not be saved, started once more: $reason"
                [ -z "$leaving" ] || stop "left without a checkpoint: $reason" 3 ;;
            left) leaving=${leaving:-itself} ;;
            machine) leave_host "$at" "$reason" ;;
            *) say "the processes died without a word; node logs: $NODE_LOGS"; [ -n "$leaving" ] || nodes_are_up || leaving=node ;;
        esac
    done
    requeue
}

leave_host() { # leave_host HOST WHY: go on without a host
    unfit=$1
    [ "$unfit" != - ] || unfit=$(grep -ohE 'host [^ ]+ cannot be used' "$NODE_LOGS"/*.log | head -n 1 | cut -d' ' -f2) # a tool's word names none
    leaving=${leaving:-"host $unfit"}
    say "the job goes on without host $unfit: $2"
}

preflight() { # the checks that one process can make, before all tasks start
    outcome=$logs/outcome$ELEMENT-$(uuid)
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${container[@]}" "${wrap[@]}" "${command[@]}" --dry-run "$SLURM_NTASKS" --outcome-file "$outcome" &
    step=$! beat=''
    follow || [ -n "$leaving" ] || {
        read -r word at reason 2>/dev/null <"$outcome" && [ "$word" = machine ] && leave_host "$at" "$reason"
    } || stop "the check before the start failed, for the reason above; nothing was started" 2
}

guard() { # stop a job whose starts make no progress
    local file=$logs/launches$ELEMENT job='' before='' count=0 now
    now=$(progress)
    read -r job before count 2>/dev/null <"$file"
    if [ "${job:-$SLURM_JOB_ID}" != "$SLURM_JOB_ID" ] && [ -n "$(squeue --noheader --states=RUNNING --jobs "$job" 2>/dev/null)" ]; then
        stop "job $job is running in RUN_DIR $RUN_DIR; give another, or wait for its end" 2
    fi
    if [ "$RESTARTS/$attempt" = 0/1 ] || [ "$job" != "$SLURM_JOB_ID" ] || [ "$before" != "$now" ]; then count=0; else count=$((count + 1)); fi
    echo "$SLURM_JOB_ID $now $count" >"$file"
    [ "$count" -le "$MAX_RESTARTS" ] || stop "stopped: $MAX_RESTARTS restarts in a row ended without progress ($now); MAX_RESTARTS allows more"
    [ "$attempt" = 1 ] || sleep $((PAUSE * count))
}

progress() { # print a word that changes when the run makes progress
    if [ "$listens" = 1 ]; then cat "$RUN_DIR/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
    else du -sb "$OUTPUT" 2>/dev/null | cut -f1; fi
}

start() { # one job step: every task runs the command
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + RESTARTS * 4 + attempt) % 12000)) # another port than the start before
    NODE_LOGS=$logs/$SLURM_JOB_ID.$RESTARTS.$attempt
    outcome=$logs/outcome$ELEMENT-$(uuid) beat=$logs/heartbeat$ELEMENT
    export MASTER_ADDR MASTER_PORT NODE_LOGS OUTCOME=$outcome LISTENS=$listens
    export SALT_LAUNCH=$SLURM_JOB_ID.$RESTARTS.$attempt # a later start takes --save at once from a start that died
    mkdir -p "$NODE_LOGS"
    rm -f "$beat"
    printf '%4095s\n' '' >"$outcome" # reserve room for the word: the run may fill the disk
    local own=()
    [ "$listens" = 0 ] || own=(--outcome-file "$outcome" --heartbeat-file "$beat")
    say "start $((RESTARTS + 1)).$attempt: $SLURM_NTASKS tasks, rank 0 at $MASTER_ADDR:$MASTER_PORT, node logs in $NODE_LOGS"
    srun --kill-on-bad-exit=1 "${container[@]}" bash examples/task.sh "${wrap[@]}" "${command[@]}" "${own[@]}" &
    step=$!
}

follow() { # wait for the end of the step; pass signals on, repeatedly; end a step that hangs
    local now last='' since=$SECONDS
    while kill -0 "$step" 2>/dev/null; do
        sleep 2 &
        wait $! # a trap ends this at once
        now=$(cat "$beat" 2>/dev/null)
        if [ "$now" != "$last" ]; then last=$now since=$SECONDS; fi
        if [ -n "$leaving" ]; then
            kill -USR1 "$step" 2>/dev/null # repeated, since it has no effect before the trainer listens
            [ $((SECONDS - left_at)) -le "$LEAVE_SECONDS" ] || end_step "has not saved $LEAVE_SECONDS s after SIG$leaving"
        elif [ -n "$beat" ] && [ "$listens" = 1 ] && [ $((SECONDS - since)) -gt $((60 * HANG_MINUTES)) ]; then
            end_step "hangs: no step went by for $HANG_MINUTES minutes"
        fi
    done
    wait "$step"
}

end_step() { # end_step WHY: every task writes its stacks and is killed
    local id
    say "the run $1; its stacks are in the node logs"
    kill -USR2 "$step" 2>/dev/null
    sleep 5
    for id in $(squeue --noheader --steps --jobs "$SLURM_JOB_ID" --format %i | grep -E '\.[0-9]+$'); do scancel --signal=KILL "$id"; done
    wait "$step"
}

requeue() { # ask Slurm to start this job again; after preemption or `scontrol requeue` it already does; after scancel it must not
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} state
    id=${id:-$SLURM_JOB_ID}
    state=$(scontrol show job --oneliner "$id" | grep -oE '(JobState|Reason)=[A-Za-z_]+' | xargs)
    say "left because of $leaving at progress $(progress); Slurm says $state"
    case $state in
        *JobState=RUNNING* | *Reason=TimeLimit*) # the limit came before the save was done: that save is lost, the next start is not
            scontrol requeue "$id" || stop "Slurm does not requeue this job: submit it again, it goes on where it was" ;;
    esac
    [[ -z $unfit || $state == *CANCELLED* ]] || exclude "$id" "$unfit"
    exit 0
}

exclude() { # exclude JOB HOST: Slurm takes this for a job that waits, as one does after its requeue
    local before
    before=$(scontrol show job --oneliner "$1" | grep -oE 'ExcNodeList=[^ ]+' | cut -d= -f2)
    [ "${before:-(null)}" != '(null)' ] || before=''
    if scontrol update "JobId=$1" "ExcNodeList=${before:+$before,}$2"; then
        say "this job excludes ${before:+$before,}$2; if it waits with Reason=BadConstraints, mend a host and say: scontrol update JobId=$1 ExcNodeList="
    else
        say "Slurm does not exclude $2 from this job; scontrol update JobId=$1 ExcNodeList=${before:+$before,}$2"
    fi
}

report() { # say where the job runs, and what
    say "job $SLURM_JOB_ID$ELEMENT ($SLURM_JOB_NAME), start $((RESTARTS + 1)): $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes, $SLURM_JOB_NODELIST"
    say "code $(git describe --always --dirty 2>/dev/null || echo without git) in $PWD; ${CONTAINER:+container $CONTAINER; }${wrap[*]} $PYTHON"
    say "command: ${command[*]}"
    env | grep -E '^(NCCL|TORCH|PYTORCH|CUDA|GLOO|OMP|NVTE)_' | sort
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sort | uniq -c
}

nodes_are_up() { ! sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%T | grep -qE 'down|fail|drain|\*'; }
uuid() { cat /proc/sys/kernel/random/uuid; }
header() { grep -oE "^#SBATCH --$1=[0-9]+" "examples/$(basename "$0")" | cut -d= -f2; }
ranks_of_header() { echo $(($(header nodes) * $(header ntasks-per-node))); }
