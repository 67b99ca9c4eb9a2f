"""Will a run fit its GPUs? Answered on a login node, without a GPU, in under a minute.

    python tools/plan.py --config examples/model_2p8b.yaml --world-size 64 --gpu h100-80 --vocabulary-size 256000

Flags of the trainer may follow, as they would be given to it. Prints the memory of the fullest rank of each pipeline stage by kind, at the
peaks of both stages of SALT, against the card. Exit status 0: it fits; 1: it does not; 2: a mistake, with the trainer's own message.
The figures come from a trace of the real model on tensors without memory; no GPU has confirmed them. docs/planner.md says more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.cards import CARDS, SHORT_NAMES
from megatron_salt.cli import exit_status, parse_over_file
from megatron_salt.config import RunConfig
from megatron_salt.config.run import sections
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.files import refusing_file_errors
from megatron_salt.planner.compose import compose
from megatron_salt.planner.memory import GIB, HostMemory
from megatron_salt.planner.planned_run import PlannedRun, RunFlags
from megatron_salt.planner.run_tracer import read_and_trace, trace_whole_steps
from megatron_salt.planner.table import not_modelled, table, verdict, what_would_help
from megatron_salt.planner.trace import Traces
from megatron_salt.train.plan import check


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Predict the memory of a run. Precedence: defaults < --config file.yaml < flags."""

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

    trace: bool = False
    """Also trace a whole step of the fullest ranks, in bfloat16 or float32. It takes minutes for a large model."""


def whole_step_lines(run: PlannedRun, traces: Traces) -> list[str]:
    """The peaks of whole steps beside those that were composed. FP8 is left out of both: its bytes are formulas."""
    plain = run.without_fp8()
    memory = compose(plain, traces, HostMemory(staged=0, gathered=0))
    peaks = trace_whole_steps(plain, tuple((rank.place, rank.stage1 is not None) for rank in memory.stages))
    lines = []
    for rank, (stage1, stage2) in zip(memory.stages, peaks, strict=True):
        for name, composed, traced in (("stage 1", rank.stage1, stage1), ("stage 2", rank.stage2, stage2)):
            if composed is not None and traced is not None:
                lines.append(
                    f"pp {rank.pipeline_stage} {name}: a whole step without FP8 takes {traced / GIB:.2f} GiB at its peak, "
                    f"{composed.total / GIB:.2f} were composed"
                )
    return lines


@dataclass(frozen=True)
class _Gpu:
    """The GPU that a plan is for."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


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
    gpu = _gpu(asked)
    config = RunConfig(**{name: getattr(asked, name) for name in sections()})
    layout, counts = check(config, asked.world_size)
    if asked.teacher_config is not None and config.salt.teacher_load is None:
        raise UserError(f"--teacher-config {asked.teacher_config} needs --teacher-load, and the run has no teacher")
    flags = RunFlags(
        config=config, layout=layout, plan=counts, vocabulary_size=asked.vocabulary_size, teacher_config=asked.teacher_config,
        device="cuda", capability=gpu.capability,
    )  # fmt: skip
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
    for line in whole_step_lines(run, traces) if asked.trace else []:
        print(line)
    print(not_modelled())
    fits, line = verdict(memory, gpu.memory_gib)
    for flag in [] if fits else what_would_help(run, memory):
        print(f"would help: {flag}")
    print(line)
    return 0 if fits else 1


def _gpu(asked: PlanConfig) -> _Gpu:
    """The GPU of the flags. Raises UserError."""
    given = asked.gpu_memory_gib
    if given is not None and not 0 < given < 1e6:
        raise UserError(f"--gpu-memory-gib must be above 0, got {given}")
    if asked.gpu is None:
        if given is None:
            raise UserError(f"give --gpu, one of {', '.join(SHORT_NAMES)}, or --gpu-memory-gib")
        return _Gpu("a GPU without a name", given, CARDS[SHORT_NAMES["h100-80"]].capability)
    name = SHORT_NAMES.get(asked.gpu.lower(), asked.gpu)
    if name not in CARDS:
        known = [*SHORT_NAMES, *CARDS]
        raise UserError(
            f"--gpu {asked.gpu} is not known{did_you_mean(asked.gpu, known)}; known are {', '.join(SHORT_NAMES)}, and names of "
            "drivers such as NVIDIA L40; or give --gpu-memory-gib"
        )
    return _Gpu(name, given or CARDS[name].memory_gib, CARDS[name].capability)


if __name__ == "__main__":
    sys.exit(main())
