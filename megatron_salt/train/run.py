"""A rank's part in a run: join the other ranks, build, train, leave."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_salt.cards import Products, peak_tflops
from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.integrity import DamagedCheckpoint
from megatron_salt.checkpoint.loading import glance_at_checkpoint, open_checkpoint
from megatron_salt.checkpoint.run_state import OpenedCheckpoint, RunState
from megatron_salt.config import RunConfig, TrainingConfig, flag
from megatron_salt.config.data import NAMED_SETS
from megatron_salt.data.batch import ReadAhead
from megatron_salt.data.blend import parse_valid_data_path
from megatron_salt.errors import LeftEarly, Look, SaveError, UserError
from megatron_salt.files import real_path
from megatron_salt.metrics.profiling import Profiler
from megatron_salt.metrics.run_log import RunLog
from megatron_salt.metrics.run_sinks import tensorboard_directory
from megatron_salt.metrics.stragglers import Heartbeat, StragglerReport
from megatron_salt.model.flops import flops_per_token
from megatron_salt.parallel.collectives import begin_largest, first_problem, from_rank_0, gathered
from megatron_salt.parallel.device import device_name
from megatron_salt.parallel.hardware import refuse_connections
from megatron_salt.parallel.launch import choose_deterministic_operations, describe, distributed, find_hardware
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.build import build
from megatron_salt.train.build_model import count_parameters
from megatron_salt.train.exit import ExitPlan, SignalWatch, reason_alone
from megatron_salt.train.inputs import Inputs, read_inputs
from megatron_salt.train.launcher import Word, write_outcome
from megatron_salt.train.loop import train
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.start import HostMemory, choose_precisions, decide_start, host_memory_of_save, told_of_flags
from megatron_salt.train.state import log_cost_of_scores, log_start

log = logging.getLogger(__name__)

PATHS = (
    "save", "load", "exit_file", "teacher_load", "teacher_cache", "stage1_selection", "tokenizer_model", "vocab_file",
    "merge_file",
)  # fmt: skip
LISTS_OF_PATHS = ("data_path", "valid_data_path", "eval_tasks", "eval_tasks_shot_file")
FOR_THE_LAUNCHER = ("outcome_file",)


def run_session(config: RunConfig, layout: Layout, plan: RunPlan, watch: SignalWatch | None, started: float) -> None:
    """Carry out a run whose flags are checked. Every rank calls. Raises UserError.

    watch: notes signals; None without --exit-signal-handler. started: time.monotonic() when the program began.
    """
    hardware = find_hardware(config.parallel.device)
    refuse_connections(layout.tensor, layout.context, hardware.capability)
    inputs = read_inputs(config)
    precisions = choose_precisions(config, plan, None if inputs.teacher is None else inputs.teacher.model, hardware)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    rendezvous_timeout = timedelta(minutes=config.parallel.rendezvous_timeout_minutes)
    leaving = partial(reason_alone, watch, config.training.exit_file)
    with ExitStack() as held, distributed(timeout, rendezvous_timeout, leaving, config.parallel.device):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        start_logging(rank, world_size)
        refuse_other_flags(config)
        profiler = Profiler(config.training, rank, tensorboard_directory(config.logging, config.checkpoint.save))
        log.info("%s", describe(hardware))
        if config.training.deterministic:
            log.info("%s", choose_deterministic_operations())
        log.info("student: %s%s", precisions.student, "" if inputs.teacher is None else f"; teacher: {precisions.teacher}")
        for line in told_of_flags(config):
            log.warning("%s", line)
        exit_plan = ExitPlan(
            exit_interval=config.training.exit_interval, exit_duration_in_mins=config.training.exit_duration_in_mins,
            watch=watch, begin=begin_largest, started=started, exit_file=config.training.exit_file, looks=rank == 0,
        )  # fmt: skip
        try:
            exit_plan.look("reading the data")
            identity, memory_of_load, opened = decide_together(config, plan, layout, inputs, exit_plan.look)
            if memory_of_load is not None:
                log_memory(memory_of_load)
            run, start = build(
                config, plan, layout, inputs, identity, timeout=timeout, precisions=precisions, held=held, opened=opened, watch=watch,
                look=exit_plan.look,
            )  # fmt: skip
        except LeftEarly as left:
            leave_before_a_step(config.training.outcome_file, left)
            return
        if config.checkpoint.save is not None:
            exit_plan.leave_where(run.checkpointer.is_taken)
        parameters = count_parameters(run.student)
        padded_vocabulary_size = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
        flops = flops_per_token(config.model, config.training.seq_length, padded_vocabulary_size)
        if config.checkpoint.save is not None and config.parallel.use_distributed_optimizer:
            log_memory(
                host_memory_of_save(config.model, config.parallel, layout, padded_vocabulary_size, config.training.seq_length)
            )
        with open_log(config, start.step, run.plan.total_steps, flops) as run_log, ReadAhead() as reader:
            log_start(config.training, plan, layout, start, parameters, run_log)
            if run.stage1 is not None and run.stage_samples is not None:
                log_cost_of_scores(run, run.stage1, inputs.teacher, start, flops, run_log)
            heartbeat = Heartbeat(config.logging.heartbeat_file, active=rank == 0)
            stragglers = StragglerReport(config.logging.straggler_report_interval)
            progress = train(
                run, start, config.training, config.checkpoint, run_log, reader, exit_plan, profiler, heartbeat, stragglers
            )
        if config.checkpoint.save is not None and progress.step > start.step:
            refuse_unsaved(Path(config.checkpoint.save), progress.step)
    if rank == 0:  # after the last barrier: every rank has saved
        write_end(config.training, run.plan.total_steps, progress, exit_plan.reason)


def refuse_other_flags(config: RunConfig) -> None:
    """Raise UserError where ranks were started with different flags, before they wait for each other in vain. Collective.

    Paths may differ from node to node. Whether a path is given may not, nor how many words --data-path has. Files that a launcher
    alone reads (--outcome-file, --heartbeat-file) and the flags of the log may differ.
    """
    own = compared_flags(config)
    everyone = gathered(own)
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs[what] != value:
                raise UserError(
                    f"{what} is {value} on rank 0 and {theirs[what]} on rank {rank}: start every rank with the same flags"
                )


def compared_flags(config: RunConfig) -> dict[str, object]:
    """{words for a message: value} of everything that all ranks must have in common. Pure."""
    compared: dict[str, object] = {}
    for section in (
        config.model, config.parallel, config.training, config.quantization, config.optimizer, config.checkpoint, config.salt,
        config.data, config.tokenizer,
    ):  # fmt: skip
        for name, value in vars(section).items():
            if name in PATHS:
                compared[f"whether {flag(name)} is given"] = value is not None
            elif name in LISTS_OF_PATHS:
                compared[f"the number of words in {flag(name)}"] = len(value)
                if name in NAMED_SETS:
                    compared[f"the sets of {flag(name)}"] = " ".join(parse_valid_data_path(value)) or "none"
            elif name not in FOR_THE_LAUNCHER:
                compared[flag(name)] = value
    return compared


def decide_together(
    config: RunConfig, plan: RunPlan, layout: Layout, inputs: Inputs, look: Look
) -> tuple[RunIdentity, HostMemory | None, OpenedCheckpoint | None]:
    """Decide the start on rank 0 and raise its UserError on every rank, before --save is made. Collective over all ranks.

    Returns the identity of the run, the host memory that loading takes where that is much, and the checkpoint of --load where that is not
    in --save. A checkpoint in --save is opened later, once that directory is this run's own; until then its state.json must do. look:
    called while files are verified.
    """
    checkpoint, load = config.checkpoint, None if config.checkpoint.load is None else Path(config.checkpoint.load)

    def decide(opened: OpenedCheckpoint | None) -> tuple[RunIdentity, HostMemory | None]:
        logging.disable(logging.ERROR)  # loading the checkpoint logs the same again
        try:
            if load is not None and opened is None:
                opened = glance_at_checkpoint(load, checkpoint.load_fallback)
            start = decide_start(config, layout, plan, inputs, opened)
            return start.identity, start.memory_of_load
        finally:
            logging.disable(logging.NOTSET)

    opened = None
    if load is not None and (
        checkpoint.save is None or real_path(checkpoint.save) not in (real_path(load), real_path(load).parent)
    ):
        opened = open_checkpoint(load, checkpoint.load_fallback, look=look)
    try:
        return *from_rank_0(lambda: decide(opened)), opened
    except DamagedCheckpoint:
        assert load is not None
        open_checkpoint(load, checkpoint.load_fallback)  # names everything that is damaged
        raise


def log_memory(memory: HostMemory) -> None:
    """Log the line, as a warning where this machine has too little."""
    log.log(logging.INFO if memory.fits else logging.WARNING, "%s", memory.line)


def write_end(training: TrainingConfig, total_steps: int, progress: RunState, reason: str | None) -> None:
    """Write --outcome-file's line after a run that ended well. reason: to leave before the end. Rank 0 calls."""
    word: Word = "left"
    if progress.step < total_steps:
        message = f"before its last step, {total_steps}"
    elif progress.evaluation_due and (training.eval_iters or training.eval_tasks):
        message = "before its last evaluation"
    else:
        word, message = "done", "after its last step"
    if word == "left" and reason is not None:
        message += f": {reason}"
    write_outcome(training.outcome_file, word, progress.step, message)


def leave_before_a_step(outcome_file: str | None, left: LeftEarly) -> None:
    """Log, and write to --outcome-file, that the run leaves with nothing to save, and why. Every rank calls."""
    where = "before the first step of this start" if left.step is None else f"before step {left.step + 1}"
    log.info("left %s: %s", where, left)
    if dist.get_rank() == 0:
        write_outcome(outcome_file, "left", left.step, f"{where}: {left}")


def refuse_unsaved(save: Path, step: int) -> None:
    """Raise SaveError unless --save holds the whole checkpoint of `step`, the last step of this start. Collective over all ranks.

    A damaged tracker is logged and written anew, since the checkpoint itself is whole."""

    def problem_on_disk() -> str | None:
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

    problem = from_rank_0(problem_on_disk)
    if problem is not None:
        raise SaveError(problem)


def _mended_tracker(save: Path, step: int) -> int:
    """The step that the tracker names. A tracker that names none is logged, and written anew with `step`. Raises OSError."""
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


def open_log(config: RunConfig, start_step: int, total_steps: int, flops: float) -> RunLog:
    """The run's log, active on the last rank, which holds the loss. Collective: where that rank cannot write, all raise UserError."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log, problem = None, None
    try:
        log = RunLog(
            config.logging, active=rank == world_size - 1, save=config.checkpoint.save, start_step=start_step,
            total_steps=total_steps, flops_per_token=flops, seq_length=config.training.seq_length, world_size=world_size,
            peak_tflops=peak_of_device(config), config=asdict(config),
        )  # fmt: skip
    except UserError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)
    assert log is not None
    return log


def peak_of_device(config: RunConfig) -> float | None:
    """Peak 10^12 FLOP/s of this rank's device in the run's precision, without sparsity; None where neither the table nor a flag has it."""
    own: Products = "bf16" if config.training.bf16 else "fp32"
    products = "fp8" if config.quantization.fp8_format is not None else own
    return peak_tflops(device_name(), products, config.logging.device_peak_tflops)


def start_logging(rank: int, world_size: int) -> None:
    """Set up `logging`. A run speaks by two ways, and every module keeps to this rule.

    stdout: what the run was asked to tell. These are the lines of RunLog, on the last rank, which holds the loss, and the report of
    --dry-run. A program may read them.
    stderr: everything about how it goes, for people. `logging` has information from the last rank and warnings from rank 0, since all
    ranks would say the same. What one rank alone knows is printed there by that rank (metrics/retrying_sink.py), and so is the one
    line of an error that ends the program (cli.py).
    """
    last = rank == world_size - 1
    handler = logging.StreamHandler()
    if last and rank > 0:
        handler.addFilter(lambda record: record.levelno < logging.WARNING)
    level = logging.INFO if last else logging.WARNING if rank == 0 else logging.CRITICAL
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
