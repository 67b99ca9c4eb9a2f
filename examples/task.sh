#!/usr/bin/env bash
# One task of a job's step: `task.sh COMMAND...`, started by examples/launch.sh on every GPU. Gives the process its rank, and its output
# to the job's log and to one file a node. The trainer writes by itself how it ended; of a tool it is said here, by the tool's own status.
[ "$LISTENS" = 0 ] || trap '' TERM USR1 USR2 # until the trainer listens, which takes its imports: whoever signals repeats it
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
[ "$LISTENS" = 1 ] || trap : TERM USR1 # they end a tool, or it leaves; this script lives to say which
"$@" 2>&1 | (trap '' TERM USR1 USR2; exec tee -a "$NODE_LOGS/${SLURMD_NODENAME:-$(hostname -s)}.log")
status=${PIPESTATUS[0]}
if [ "$LISTENS" = 0 ] && [ "$SLURM_PROCID" = 0 ]; then # over the blanks that are there: a full disk has no room for more
    case $status in
        0) echo "done - finished" 1<>"$OUTCOME" ;;
        2) echo "refused - see the log" 1<>"$OUTCOME" ;;
        3) echo "unsaved - see the log" 1<>"$OUTCOME" ;; # what it made is not whole; the same command goes on
        4) echo "nonfinite - see the log" 1<>"$OUTCOME" ;;
    esac
fi
exit "$status"
