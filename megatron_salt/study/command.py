"""Run a study, or go on with it, or only report: arms x seeds of ordinary runs, as STUDY.yaml says. docs/study.md describes the file.

    python tools/study.py STUDY.yaml --dry-run      # what would be done, and what is done
    python tools/study.py STUDY.yaml --local 2      # two jobs at a time on this machine
    python tools/study.py STUDY.yaml --only-report

Every run is an ordinary run of pretrain in a directory of its own. What is done is not done again; a run that was stopped goes on. One that
fails is shown with its reason, and does not stop the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from megatron_salt.cli import run_tool
from megatron_salt.config.checks import at_least
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.files import sole_writer
from megatron_salt.study.job import SlurmOptions

if TYPE_CHECKING:
    from megatron_salt.study.definition.plan_jobs import StudyPlan
    from megatron_salt.study.definition.study import Study

REPORT = "report"
"""In OUTPUT: the page, Markdown, CSV files and pictures"""

T = TypeVar("T")


@dataclass(frozen=True)
class StudyConfig:
    """Run, resume or report a study: arms x seeds of training runs."""

    study: tyro.conf.Positional[str]
    """STUDY.yaml, see docs/study.md."""

    local: int = 1
    """Jobs at a time on this machine, which share its cores and GPUs."""

    slurm: bool = False
    """Submit every job to Slurm instead, as `slurm:` of STUDY.yaml says."""

    only_report: bool = False
    """Start nothing; write the report of what there is."""

    dry_run: bool = False
    """Show the jobs, how many are done, and the FLOPs; check the flags of all runs; write nothing."""

    arms: tuple[str, ...] = ()
    """Names of arms: do only these and what they need. Default: all."""

    seeds: tuple[int, ...] = ()
    """Do only the runs of these seeds. Default: all."""

    def __post_init__(self) -> None:
        at_least(self, 1, "local")
        given = [name for name in ("slurm", "only_report", "dry_run") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} are two things to do; give one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(StudyConfig, study, argv)


def study(command: StudyConfig) -> int:
    """Do what the flags ask for. Returns 0, 1 where jobs are not done, 128 + signal where it was told to leave. Raises UserError."""
    from megatron_salt.metrics.sinks import refuse_in_the_way
    from megatron_salt.study.definition.directories import begin, other_runs, refuse_missing_inputs, refuse_other_work
    from megatron_salt.study.definition.plan_jobs import plan_jobs
    from megatron_salt.study.definition.study_file import read_study
    from megatron_salt.study.definition.teacher_facts import read_teacher_facts
    from megatron_salt.study.execute import run_jobs

    path = Path(command.study)
    defined = read_study(path)
    text = path.read_bytes()
    longer = {arm.teacher for arm in defined.arms if arm.kind == "longer" and arm.teacher is not None}
    whole = plan_jobs(defined, read_teacher_facts(defined, longer) if longer else None)
    plan = whole.part(
        _known(command.arms, [arm.name for arm in defined.arms], "--arms"), _known(command.seeds, defined.seeds, "--seeds")
    )
    refuse_in_the_way(defined.output / REPORT, f"output: {defined.output}")
    refuse_other_work(whole)
    if not command.only_report:
        refuse_missing_inputs(defined, plan)
    for directory in other_runs(whole, defined.output):
        print(f"{directory} is no run of this study (any more); it stays as it is, and no figure counts it")
    if command.dry_run:
        show(defined, plan)
        return 0
    status = 0
    if not command.only_report:
        with sole_writer("output", defined.output):
            jobs = begin(plan, defined.output, text)
        slurm = (defined.slurm or SlurmOptions()) if command.slurm else None
        status = run_jobs(jobs, defined.output, command.local, slurm=slurm)
    if status < 128:
        report(defined, whole, text.decode("utf-8"))
    return status


def show(defined: Study, plan: StudyPlan) -> None:
    """Print the jobs of a plan, how far each is, and their FLOPs as far as they can be known."""
    from megatron_salt.study.definition.teacher_facts import planned_flops
    from megatron_salt.study.jobs.outcome import read_outcome
    from megatron_salt.study.jobs.status import status_at_start

    states = {job.name: status_at_start(read_outcome(job.outcome)) for job in plan.jobs}
    try:
        flops, unknown = planned_flops(defined, plan), ""
    except UserError as error:
        flops, unknown = dict.fromkeys(states), f" ({error})"
    width = max((len(job.name) for job in plan.jobs), default=0)
    for job in plan.jobs:
        work = f"{job.steps} steps" if job.steps else job.kind
        cost, told = flops[job.name], states[job.name]
        words = [f"{job.name:{width}}  {told.state:8}{work:>12}", "" if not cost else f"  {cost:.3g} FLOPs"]
        print(*words, f"  {told.reason}" if told.reason else "", sep="")
    counts = Counter(status.state for status in states.values())
    print(f"{len(plan.jobs)} jobs in {defined.output}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    left = {name for name, status in states.items() if status.state != "done"}
    if any(flops[name] is None for name in states):
        print(f"FLOPs: not known of all jobs{unknown}")
    total, rest = (sum(flops[name] or 0.0 for name in names) for names in (states, left))
    print(f"FLOPs: {total:.3g} in all, {rest:.3g} of them in jobs that are not done")


def report(defined: Study, plan: StudyPlan, definition: str) -> None:
    """Write the report of all runs of a plan, whatever state they are in, and print their states. definition: text of STUDY.yaml."""
    from megatron_salt.study.jobs.outcome import read_outcome
    from megatron_salt.study.jobs.status import failed_needs
    from megatron_salt.study.preparations import read_preparations
    from megatron_salt.study.read_runs import ExpectedRun, read_run
    from megatron_salt.study.report.facts import StudyFacts
    from megatron_salt.study.report.machine import this_machine
    from megatron_salt.study.report.write import write_report

    steps = {job.name: job.steps for job in plan.jobs}
    results = [
        read_run(
            ExpectedRun(
                arm=run.arm, kind=run.kind, seed=run.seed, settings=run.settings, directory=run.directory, steps=steps[run.job]
            )
        )
        for run in plan.runs
    ]
    causes = failed_needs(plan.jobs, {job.name: read_outcome(job.outcome) for job in plan.jobs})
    results = [
        replace(result, reason=causes[run.job]) if result.state == "waiting" and run.job in causes else result
        for run, result in zip(plan.runs, results, strict=True)
    ]
    facts = StudyFacts(
        name=defined.output.name,
        primary=defined.primary,
        figures=defined.figures,
        preparation_of=read_preparations(defined, plan),
        definition=definition,
        machine=this_machine(),
    )
    for result in results:
        final = None if result.curve is None else result.curve.final
        figure = "" if final is None else f"  held-out loss {final:.4f}"
        print(f"{result.label}, seed {result.seed}: {result.state}{figure}{f': {result.reason}' if result.reason else ''}")
    written = write_report(facts, results, defined.output / REPORT)
    print("wrote", *written)


def _known(given: Collection[T], known: Sequence[T], flag_name: str) -> Collection[T]:
    """`given`, or all where nothing is given. Raises UserError for what the study does not have."""
    for one in given:
        if one not in known:
            hint = did_you_mean(str(one), map(str, known))
            raise UserError(f"{flag_name} {one}: the study has {', '.join(map(str, known))}{hint}")
    return given or known
