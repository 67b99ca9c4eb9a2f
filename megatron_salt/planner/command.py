"""Will a run fit its GPUs? Answered on a login node, without a GPU, in under a minute.

    python tools/plan.py --config examples/model_2p8b.yaml --world-size 64 --gpu h100-80 --vocabulary-size 256000

Flags of the trainer may follow, as they would be given to it. Prints the memory of the fullest rank of each pipeline stage by kind, at the
peaks of both stages of SALT, against the card. Exit status 0: it fits; 1: it does not; 2: a mistake, with the trainer's own message.
The figures come from a trace of the real model on tensors without memory; no GPU has confirmed them. docs/planner.md says more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_salt.cli import exit_status, parse_over_file
from megatron_salt.config import RunConfig, SaltConfig
from megatron_salt.config.run import sections
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_directory, refuse_present, refusing_file_errors
from megatron_salt.planner.advice import what_would_help
from megatron_salt.planner.compose import compose
from megatron_salt.planner.gpu import Gpu, gpu_of
from megatron_salt.planner.memory import GIB, HostMemory, PlannedMemory, usable_gib
from megatron_salt.planner.picture import SUFFIXES, draw
from megatron_salt.planner.planned_run import PlannedRun, RunFlags
from megatron_salt.planner.run_tracer import children, read_and_trace, read_candidates, trace, trace_whole_steps
from megatron_salt.planner.search.report import search_lines
from megatron_salt.planner.search.search import search
from megatron_salt.planner.search.space import space
from megatron_salt.planner.table import not_modelled, table, verdict
from megatron_salt.planner.time.machine import Machine, MachineFlags, machine_of
from megatron_salt.planner.time.report import time_lines
from megatron_salt.planner.time.roofline import run_time
from megatron_salt.planner.time.whole_run import Preparation, baseline_line, evaluation_lines, whole_run, whole_run_lines
from megatron_salt.planner.trace import Traces
from megatron_salt.train.plan import check


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Predict the memory, the time and the cost of a run. Precedence: defaults < --config file.yaml < flags."""

    config: str | None = None
    """YAML file of the run, as the trainer takes it."""

    world_size: int | None = None
    """Ranks of the run, one a GPU. Required."""

    gpu: str | None = None
    """The GPU: h100-80, a100-40, ..., or the name that its driver gives."""

    gpu_memory_gib: float | None = None
    """GiB of a GPU that has no name here. Without --gpu it is otherwise taken for an H100."""

    vocabulary_size: int | None = None
    """Ids of the tokenizer. Default: read from the run's tokenizer."""

    teacher_config: str | None = None
    """YAML file whose model section is the teacher's, for a --teacher-load that has no checkpoint yet.
    Its vocabulary is the run's."""

    mfu: float | None = None
    """Part of the peak FLOP/s that layers and head reach together on a GPU, communication and bubbles left out: given or measured.
    Default: 0.7 of the peak for matrix products and 0.9 of the memory's for everything else. Our choice."""

    nvlink_gbs: float | None = None
    """10^9 bytes/s from one GPU to another of its node, in one direction. Default: from data sheets."""

    network_gbs: float | None = None
    """10^9 bytes/s between nodes for each GPU, in one direction. Default: 50, a port of 400 Gbit/s for each GPU."""

    gpus_per_node: int = 8
    """GPUs that NVLink connects."""

    teacher_tokens: float | None = None
    """Tokens that the teacher was trained on, for its cost.
    Default: those of --teacher-config's own training section; without that the cost is left out."""

    scored_share: float = 1.0
    """Windows that the teacher scores for --stage1-selection / samples of the run."""

    cached_share: float = 0.0
    """Share of the samples of stage 1 that --teacher-cache holds when the run begins; 1: a full cache.
    Default: an empty one."""

    reached_at: float = 0.7
    """Share of the baseline's steps at which SALT is supposed to reach the baseline's final figure.
    The paper reports 0.7; a plan cannot know it."""

    search: bool = False
    """Try other layouts of the run: tp, pp, vp, cp, micro-batch, recomputation and the teacher's layout.
    Prints the ten fastest that fit, with their flags, and why the others do not fit."""

    search_layouts: int = 500
    """Layouts that --search traces, the fastest first; more where fewer than ten of them fit."""

    picture: str | None = None
    """File for a picture, .png or .svg: memory of each pipeline stage, and when each stage computes in a step."""

    overwrite: bool = False
    """Replace an existing picture."""

    trace: bool = False
    """Also trace a whole step of the fullest ranks, in bfloat16 or float32. It takes minutes for a large model; each step is told
    when it is done."""


def whole_step_lines(run: PlannedRun, traces: Traces) -> Iterator[str]:
    """The peaks of whole steps beside those that were composed, each as soon as it is traced. FP8 is left out of both: its bytes are
    formulas."""
    plain = run.without_fp8()
    memory = compose(plain, traces, HostMemory(staged=0, gathered=0))
    steps = [
        (rank, name, moment)
        for rank in memory.stages
        for name, moment in (("stage 1", rank.stage1), ("stage 2", rank.stage2))
        if moment is not None
    ]
    started = time.monotonic()
    yield f"tracing {len(steps)} whole steps"
    peaks = trace_whole_steps(plain, [(rank.place, name == "stage 1") for rank, name, _ in steps])
    for number, ((rank, name, moment), peak) in enumerate(zip(steps, peaks, strict=True), 1):
        yield (
            f"{number} of {len(steps)}, after {time.monotonic() - started:.0f} s: pp {rank.pipeline_stage} {name}: a whole step without "
            f"FP8 takes {peak / GIB:.2f} GiB at its peak, {moment.total / GIB:.2f} were composed"
        )


def _times(asked: PlanConfig, gpu: Gpu, run: PlannedRun, memory: PlannedMemory) -> list[str]:
    """Times, hours and economics; one line where the GPU's peaks are not known. Draws the picture that is asked for."""
    machine = machine_of(_machine_flags(asked, gpu), run)
    times = None if machine is None else run_time(run, machine)
    if asked.picture is not None:
        step = None if times is None else times.stage1 or times.stage2
        draw(memory, gpu.memory_gib, usable_gib(gpu.memory_gib), step, run.plan.num_microbatches, Path(asked.picture))
    if machine is None or times is None:
        return ["no times: the peaks of this GPU are not known; --device-peak-tflops and --device-peak-gb-per-s tell them"]
    lines = time_lines(run, machine, times)
    lines += evaluation_lines(run, times)
    if run.teacher is None:
        return [*lines, baseline_line(run, times)]
    return [*lines, *whole_run_lines(whole_run(run, machine, times, _preparation(asked, run)), asked.reached_at)]


def _refuse_picture(asked: PlanConfig) -> None:
    """Raise UserError where the picture cannot be drawn under its name."""
    if asked.picture is None:
        return
    output = Path(asked.picture)
    if asked.search:
        raise UserError(f"--picture {output} shows one layout, and --search tries many; give its flags without --search")
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--picture {output} must end in {' or '.join(SUFFIXES)}")
    refuse_directory("--picture", output)
    refuse_present("--picture", output, [output], asked.overwrite)
    if not output.parent.is_dir():
        raise UserError(f"--picture {output}: there is no directory {output.parent}")


def _search(asked: PlanConfig, gpu: Gpu, flags: RunFlags) -> int:
    """Print the fastest layouts that fit. Returns 0 where there is one, else 1. Raises UserError."""
    tried = space(flags.config, flags.layout.world_size, asked.gpus_per_node)
    asked_flags = [replace(flags, config=one.config, layout=one.layout, plan=one.plan) for one in tried.candidates]
    if not asked_flags:
        raise UserError(f"--search: no layout of {flags.layout.world_size} ranks is allowed: {tried.refused[0]}")
    with children(2) as pool:
        answers = pool.submit(read_candidates, asked_flags).result()
        runs = [answer for answer in answers if isinstance(answer, PlannedRun)]
        refused = [*tried.refused, *(answer for answer in answers if isinstance(answer, str))]
        machine = machine_of(_machine_flags(asked, gpu), runs[0]) if runs else None
        if runs and machine is None:
            raise UserError(
                "--search ranks by time: give --device-peak-tflops and --device-peak-gb-per-s, the peaks of this GPU"
            )
        print(f"--search: {len(runs)} layouts of {flags.layout.world_size} ranks on {gpu.name}")
        if machine is not None:
            print(f"times are estimates, memory is unmeasured, no GPU has confirmed either: {machine.stated}")
        usable = usable_gib(gpu.memory_gib)
        result = search(
            runs, refused, machine_of=lambda run: _known(machine_of(_machine_flags(asked, gpu), run)), usable=usable,
            most=asked.search_layouts, trace=lambda tasks: pool.map(trace, tasks),
        )  # fmt: skip
    for line in search_lines(result, flags.config, usable):
        print(line)
    return 0 if result.best else 1


def _known(machine: Machine | None) -> Machine:
    """The machine of a layout, where that of another layout of the run is known."""
    assert machine is not None
    return machine


def _machine_flags(asked: PlanConfig, gpu: Gpu) -> MachineFlags:
    return MachineFlags(
        gpu=gpu.name,
        mfu=asked.mfu,
        nvlink_gbs=asked.nvlink_gbs,
        network_gbs=asked.network_gbs,
        gpus_per_node=asked.gpus_per_node,
    )


def _preparation(asked: PlanConfig, run: PlannedRun) -> Preparation:
    """What the flags say of the work before the run."""
    tokens = asked.teacher_tokens
    if tokens is None and run.teacher is not None:
        tokens = run.teacher.trained_tokens
    return Preparation(teacher_tokens=tokens, scored_share=asked.scored_share, reached_at=asked.reached_at)


def _refuse_shares(asked: PlanConfig) -> None:
    """Raise UserError for shares that are none."""
    for name, share in (("--scored-share", asked.scored_share), ("--reached-at", asked.reached_at)):
        if not 0 < share <= 1:
            raise UserError(f"{name} must be above 0 and at most 1, got {share}")
    if not 0 <= asked.cached_share <= 1:
        raise UserError(f"--cached-share must lie in [0, 1], got {asked.cached_share}")
    if asked.cached_share and asked.salt.teacher_cache is None:
        raise UserError(f"--cached-share {asked.cached_share:g} needs --teacher-cache")
    if asked.teacher_tokens is not None and not 0 < asked.teacher_tokens < 1e18:
        raise UserError(f"--teacher-tokens must be above 0, got {asked.teacher_tokens}")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan what `argv` asks for; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv

    def action() -> int:
        with refusing_file_errors():
            return plan(parse_over_file(PlanConfig, words))

    return exit_status(action)


def plan(asked: PlanConfig) -> int:
    """Print the plan. Returns 0 where the run fits, else 1. Raises UserError."""
    if asked.world_size is None:
        raise UserError("give --world-size, the ranks of the run, one a GPU")
    if asked.world_size < 1:
        raise UserError(f"--world-size must be at least 1 rank, got {asked.world_size}")
    if asked.vocabulary_size is not None and asked.vocabulary_size < 1:
        raise UserError(f"--vocabulary-size must be at least 1, got {asked.vocabulary_size}")
    gpu = gpu_of(asked.gpu, asked.gpu_memory_gib)
    _refuse_shares(asked)
    if asked.search_layouts < 1:
        raise UserError(f"--search-layouts must be at least 1, got {asked.search_layouts}")
    _machine_flags(asked, gpu)
    _refuse_picture(asked)
    config = RunConfig(**{name: getattr(asked, name) for name in sections()})
    layout, counts = check(config, asked.world_size)
    if asked.teacher_config is not None and config.salt.teacher_load is None:
        raise UserError(f"--teacher-config {asked.teacher_config} needs --teacher-load, and the run has no teacher")
    flags = RunFlags(
        config=config, layout=layout, plan=counts, vocabulary_size=asked.vocabulary_size, teacher_config=asked.teacher_config,
        device="cuda", capability=gpu.capability, cached_share=asked.cached_share,
    )  # fmt: skip
    if asked.search:
        return _search(asked, gpu, flags)
    fits, line = tell(asked, gpu, flags)
    print(line)
    return 0 if fits else 1


def refuse_too_large(config: RunConfig, world_size: int, gpu: Gpu, *, in_stage2: bool) -> None:
    """Print the plan of a run on a GPU. Raises UserError where it would not fit. What --dry-run --gpu adds to its own checks.

    in_stage2: the run goes on in stage 2, so its teacher need not fit, nor be there."""
    layout, counts = check(config, world_size)
    if in_stage2:
        counts = counts.in_stage2()
        training = replace(
            config.training, micro_batch_size=counts.micro_batch_size, global_batch_size=counts.global_batch_size
        )
        config = replace(config, salt=SaltConfig(), training=training)
        layout, counts = check(config, world_size)
    flags = RunFlags(
        config=config, layout=layout, plan=counts, vocabulary_size=None, teacher_config=None, device="cuda",
        capability=gpu.capability,
    )  # fmt: skip
    asked = PlanConfig(**{name: getattr(config, name) for name in sections()}, world_size=world_size, gpu=gpu.name)
    fits, line = tell(asked, gpu, flags)
    if not fits:
        raise UserError(f"the run {line}; flags that would help stand above")
    print(line)


def tell(asked: PlanConfig, gpu: Gpu, flags: RunFlags) -> tuple[bool, str]:
    """Print the plan but for its verdict. Returns (whether the run fits, the verdict). Raises UserError."""
    layout = flags.layout
    run, traces, host = read_and_trace(flags)
    memory = compose(run, traces, host)
    sizes = ", ".join(f"{name} {size}" for name, size in layout.sizes.items())
    print(f"{layout.world_size} ranks ({sizes}) on {gpu.name}, {gpu.memory_gib:g} GiB each; layers: {run.precision}")
    if run.teacher is not None:
        print(f"teacher: {run.teacher.precision}")
    for line in table(memory):
        print(line)
    if host.most:
        print(
            f"host memory of a rank: {host.staged / GIB:.2f} GiB while a save is written in the background, "
            f"{host.gathered / GIB:.2f} GiB for a save that loads under any layout"
        )
    for line in whole_step_lines(run, traces) if asked.trace else ():
        print(line, flush=True)
    print(not_modelled(asked.salt.guides_hidden))
    for line in _times(asked, gpu, run, memory):
        print(line)
    fits, line = verdict(memory, gpu.memory_gib)
    for flag in [] if fits else what_would_help(run, memory):
        print(f"would help: {flag}")
    return fits, line


if __name__ == "__main__":
    sys.exit(main())
