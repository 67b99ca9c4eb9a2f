"""One process's part in a run: join the world, build, train, leave."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.changes import CHANGED, tell
from megatron_salt.checkpoint.compatibility import Found, RunIdentity, glance_at_checkpoint, open_checkpoint
from megatron_salt.checkpoint.integrity import DamagedCheckpoint
from megatron_salt.config import RunConfig, flag
from megatron_salt.errors import LeftEarly, SaveError, UserError
from megatron_salt.metrics.profiling import Profiler
from megatron_salt.metrics.run_log import RunLog, tensorboard_directory
from megatron_salt.metrics.stragglers import Heartbeat, StragglerReport
from megatron_salt.model.flops import flops_per_token
from megatron_salt.parallel.collectives import first_problem, from_rank_0, gathered, largest
from megatron_salt.parallel.hardware import refuse_connections
from megatron_salt.parallel.launch import describe, distributed, find_hardware
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.build import Inputs, Run, build, count_parameters, read_inputs
from megatron_salt.train.exit import ExitPlan, SignalWatch, reason_alone
from megatron_salt.train.launcher import write_outcome
from megatron_salt.train.loop import train
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.precisions import choose_precisions
from megatron_salt.train.start import find_beginning

log = logging.getLogger(__name__)


def run_session(config: RunConfig, layout: Layout, plan: RunPlan, watch: SignalWatch | None, started: float) -> None:
    """Carry out a checked run. Every rank calls. Raises UserError."""
    hardware = find_hardware()
    refuse_connections(layout.tensor, layout.context, hardware.capability)
    inputs = read_inputs(config)
    precisions = choose_precisions(config, plan, None if inputs.teacher is None else inputs.teacher.model, hardware)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    rendezvous_timeout = timedelta(minutes=config.parallel.rendezvous_timeout_minutes)
    leaving = partial(reason_alone, watch, config.training.exit_file)
    with ExitStack() as held, distributed(timeout, rendezvous_timeout, leaving):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        start_logging(rank, world_size)
        refuse_other_flags(config)
        profiler = Profiler(config.training, rank, tensorboard_directory(config.logging, config.checkpoint.save))
        log.info("%s", describe(hardware))
        log.info("student: %s%s", precisions.student, "" if inputs.teacher is None else f"; teacher: {precisions.teacher}")
        exit_plan = ExitPlan(
            exit_interval=config.training.exit_interval, exit_duration_in_mins=config.training.exit_duration_in_mins,
            watch=watch, agree=largest, started=started, exit_file=config.training.exit_file, looks=rank == 0,
        )  # fmt: skip
        try:
            exit_plan.look("reading the data")
            identity, found = begin(config, plan, layout, inputs)
            run = build(config, plan, layout, inputs, identity, timeout, precisions, held, found, watch, exit_plan.look)
        except LeftEarly as left:
            leave_before_a_step(config.training.outcome_file, left)
            return
        exit_plan.taken = None if config.checkpoint.save is None else run.checkpointer.is_taken
        parameters = count_parameters(run.student)
        padded_vocabulary_size = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
        with open_log(
            config, run, flops_per_token(config.model, config.training.seq_length, padded_vocabulary_size)
        ) as run_log:
            run_log.event(
                run.progress.step,
                f"{parameters / 1e6:.2f}M parameters on {world_size} ranks: tp {layout.tensor}, pp {layout.pipeline}, "
                f"cp {layout.context}, dp {layout.data}; "
                f"{plan.num_microbatches} microbatches of {plan.micro_batch_size} a replica and step",
                {"parameters": parameters, "layout": layout.sizes},
            )
            for event in run.progress.events:
                if event["event"] == CHANGED and event["step"] == run.progress.step:
                    run_log.event(run.progress.step, tell(event), {name: event[name] for name in ("flag", "from", "to")})
            heartbeat = Heartbeat(config.logging.heartbeat_file, active=rank == 0)
            stragglers = StragglerReport(config.logging.straggler_report_interval)
            progress = train(run, config.training, config.checkpoint, run_log, exit_plan, profiler, heartbeat, stragglers)
        if config.checkpoint.save is not None and progress.step > run.progress.step:
            refuse_unsaved(Path(config.checkpoint.save), progress.step)
    if rank == 0:  # after the last barrier: every rank has saved
        done = progress.step >= run.plan.total_steps and not (progress.evaluation_due and config.training.eval_iters)
        short = (
            f"before its last step, {run.plan.total_steps}"
            if progress.step < run.plan.total_steps
            else "before its last evaluation"
        )
        short += f": {exit_plan.reason}" if exit_plan.reason is not None else ""
        write_outcome(
            config.training.outcome_file, "done" if done else "left", progress.step, "after its last step" if done else short
        )


def refuse_other_flags(config: RunConfig) -> None:
    """Raise UserError where ranks were started with different flags, before they wait for each other in vain. Collective.

    Paths may differ from node to node; whether --save, --load and --exit-file are given may not."""
    paths = {"save": config.checkpoint.save, "load": config.checkpoint.load, "exit_file": config.training.exit_file}
    mine: dict[str, object] = {f"given {name}": path is not None for name, path in paths.items()}
    for section in (config.model, config.parallel, config.training, config.quantization, config.optimizer, config.checkpoint):
        mine |= {
            name: value for name, value in vars(section).items() if name not in ("save", "load") and not name.endswith("_file")
        }
    everyone = gathered(mine)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                what = f"whether {flag(name.split()[-1])} is given" if name.startswith("given") else flag(name)
                raise UserError(
                    f"{what} is {value} on rank 0 and {theirs[name]} on rank {rank}: start every rank with the same flags"
                )


def begin(config: RunConfig, plan: RunPlan, layout: Layout, inputs: Inputs) -> tuple[RunIdentity, Found | None]:
    """The run's identity, and --load's checkpoint where it is not in --save; what can be refused before --save is made, is. Collective.

    A checkpoint in --save is opened when that is this run's own; here one look at it must do."""
    checkpoint, load = config.checkpoint, None if config.checkpoint.load is None else Path(config.checkpoint.load)

    def find(found: Found | None) -> RunIdentity:
        logging.disable(logging.ERROR)  # what this would tell, the load of the checkpoint tells
        try:
            if load is not None and found is None:
                found = glance_at_checkpoint(load, checkpoint.load_fallback)
            return find_beginning(config, layout, plan, inputs, found).identity
        finally:
            logging.disable(logging.NOTSET)

    found = None
    if load is not None and (
        checkpoint.save is None or Path(checkpoint.save).resolve() not in (load.resolve(), load.resolve().parent)
    ):
        found = open_checkpoint(load, checkpoint.load_fallback)
    try:
        return from_rank_0(lambda: find(found)), found
    except DamagedCheckpoint:
        assert load is not None
        open_checkpoint(load, checkpoint.load_fallback)  # says all that is damaged
        raise


def leave_before_a_step(outcome_file: str | None, left: LeftEarly) -> None:
    """Say that there is nothing to save, and why. Every rank calls."""
    where = "before the first step of this start" if left.step is None else f"before step {left.step + 1}"
    log.info("left %s: %s", where, left)
    if dist.get_rank() == 0:
        write_outcome(outcome_file, "left", left.step, f"{where}: {left}")


def refuse_unsaved(save: Path, step: int) -> None:
    """Raise SaveError unless the checkpoint of `step`, the last one of this start, is whole under --save. Collective over all ranks.

    A tracker that was damaged meanwhile is told, and written anew: the checkpoint is there."""

    def look() -> str | None:
        whole = save_directory.whole_checkpoints(save)
        if step in whole:
            try:
                if _mended_tracker(save, step) == step:
                    return None
            except OSError as error:
                tracker = save / save_directory.TRACKER
                return (
                    f"{tracker} cannot be written: {error.strerror}; step {step} is saved: --load {whole[step]} goes on from it"
                )
        stands = f"{whole[max(whole)]} stands" if whole else "there is no earlier checkpoint"
        return f"the run ended at step {step}, which is not saved in --save {save}; {stands}; --load {save} goes on from it"

    problem = from_rank_0(look)
    if problem is not None:
        raise SaveError(problem)


def _mended_tracker(save: Path, step: int) -> int:
    """The step that the tracker names; one that names none is told, and written anew. Raises OSError where it cannot be."""
    try:
        latest = save_directory.read_tracker(save, "--save")
        damage = f"{save / save_directory.TRACKER} is gone"
    except UserError as error:
        latest, damage = None, str(error)
    if latest is not None:
        return latest
    save_directory.write_tracker(save, step)
    log.warning("%s; it is written anew and names step %d", damage, step)
    return step


def open_log(config: RunConfig, run: Run, flops: float) -> RunLog:
    """The run's log, active on the last rank, which holds the loss. Collective: where that rank cannot write, all raise UserError."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log, problem = None, None
    try:
        log = RunLog(
            config.logging, active=rank == world_size - 1, save=config.checkpoint.save, start_step=run.progress.step,
            total_steps=run.plan.total_steps, flops_per_token=flops, world_size=world_size, config=asdict(config),
        )  # fmt: skip
    except UserError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)
    assert log is not None
    return log


def start_logging(rank: int, world_size: int) -> None:
    """The last rank, which holds the loss, tells what happens; rank 0 warns. The others would only say the same."""
    last = rank == world_size - 1
    handler = logging.StreamHandler()
    if last and rank > 0:
        handler.addFilter(lambda record: record.levelno < logging.WARNING)
    level = logging.INFO if last else logging.WARNING if rank == 0 else logging.CRITICAL
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
