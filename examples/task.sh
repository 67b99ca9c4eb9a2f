#!/usr/bin/env bash
# One task of a job step: `task.sh COMMAND...`. examples/launch.sh starts it once for each GPU. It gives the process its rank, and copies
# the output to the job's log and to one file for each node. The trainer itself writes how it ended. For a tool, this script does so, by
# the tool's exit status.
[ "$LISTENS" = 0 ] || trap '' TERM USR1 USR2 # ignored until the trainer has imported its modules and listens; the sender repeats signals
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
[ "$LISTENS" = 1 ] || trap : TERM USR1 # the tool ends or leaves; this script lives on and writes which
"$@" 2>&1 | (trap '' TERM USR1 USR2; exec tee -a "$NODE_LOGS/${SLURMD_NODENAME:-$(hostname -s)}.log")
status=${PIPESTATUS[0]}
if [ "$LISTENS" = 0 ] && [ "$SLURM_PROCID" = 0 ]; then # overwrites the reserved blanks: a full disk has no room for more
    case $status in
        0) echo "done - finished" 1<>"$OUTCOME" ;;
        2) echo "refused - see the log" 1<>"$OUTCOME" ;;
        3) echo "unsaved - see the log" 1<>"$OUTCOME" ;; # the output is not whole; the same command continues
        5) echo "machine - see the log" 1<>"$OUTCOME" ;; # the log of a node names the host
        4) echo "nonfinite - see the log" 1<>"$OUTCOME" ;;
    esac
fi
exit "$status"
