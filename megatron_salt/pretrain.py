"""Pretraining, from the command line to the last checkpoint. The file to read first.

    torchrun --nproc-per-node 2 -m megatron_salt.pretrain --config examples/quickstart.yaml --train-iters 300

parse -> check -> read inputs -> join the world -> build -> train -> leave. A mistake of the user ends every rank with one line and exit
code 2, before anything is written (parallel/failure.py). `--help` and mistakes in flags need no torch.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections.abc import Sequence

from megatron_salt.cli import DryRun, exit_status, parse_command
from megatron_salt.config import RunConfig
from megatron_salt.errors import MachineError, UserError
from megatron_salt.files import refusing_file_errors
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.hardware import ask_for_determinism, order_launches, prepare_environment
from megatron_salt.parallel.layout import Layout, world_size_from_environment
from megatron_salt.parallel.library_warnings import hide_library_warnings
from megatron_salt.planner.gpu import gpu_of
from megatron_salt.train.exit import SignalWatch, refuse_exit_file
from megatron_salt.train.launcher import write_outcome
from megatron_salt.train.plan import check


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the exit status. SIGUSR2 prints the stack of every thread to stderr."""
    started = time.monotonic()
    faulthandler.register(signal.SIGUSR2, file=2)
    return exit_status(lambda: fail_together(lambda: pretrain(*parse_command(sys.argv[1:] if argv is None else argv), started)))


def pretrain(config: RunConfig, rehearsal: DryRun | None, started: float) -> None:
    """Train as configured, or with `rehearsal` only check whether that many ranks could.

    started: time.monotonic() at the program's start, from which --exit-duration-in-mins counts.
    """
    try:
        with refusing_file_errors():
            if rehearsal is None:
                carry_out(config, started)
            else:
                rehearse(config, rehearsal)
    except UserError as error:
        if error.outcome is not None:
            at = error.host if isinstance(error, MachineError) else None
            write_outcome(config.training.outcome_file, error.outcome, at, str(error))
        raise


def carry_out(config: RunConfig, started: float) -> None:
    """Check, join the world, train, leave. Every rank calls. Raises UserError."""
    layout, plan = check(config, world_size_from_environment())
    refuse_exit_file(config.training.exit_file)  # at once: a file that appears from here on is a reason to leave, not a mistake
    watch = SignalWatch() if config.training.exit_signal_handler else None
    try:
        hide_library_warnings()
        prepare_libraries(config, layout)
        from megatron_salt.train.run import run_session  # torch and megatron-core, whose imports take seconds

        run_session(config, layout, plan, watch, started)
    finally:
        if watch is not None:
            watch.restore()


def rehearse(config: RunConfig, asked: DryRun) -> None:
    """Check what one process can check. Raises UserError."""
    layout, plan = check(config, asked.ranks)
    gpu = None if asked.gpu is None else gpu_of(asked.gpu)
    if gpu is not None and config.parallel.device == "cpu":
        raise UserError(
            f"--gpu {asked.gpu} plans the memory of a GPU, and with --device cpu the run has none: leave one of them out"
        )
    refuse_exit_file(config.training.exit_file)
    hide_library_warnings()
    prepare_libraries(config, layout)
    from megatron_salt.train.dry_run import dry_run  # torch and megatron-core

    in_stage2 = dry_run(config, layout, plan, plans_memory=gpu is not None)
    if gpu is not None:
        from megatron_salt.planner.command import refuse_too_large

        refuse_too_large(config, asked.ranks, gpu, in_stage2=in_stage2)


def prepare_libraries(config: RunConfig, layout: Layout) -> None:
    """Set the environment variables that torch, CUDA and NCCL read when they start. Raises UserError."""
    prepare_environment(config.parallel.device)
    order_launches(layout.tensor, layout.context)
    if config.training.deterministic and config.parallel.device != "cpu":
        ask_for_determinism()


if __name__ == "__main__":
    sys.exit(main())
