"""The sections of a study's report below its first screen. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.metrics.arms import Arm
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.study.analysis.crossings import (
    CROSSING_HEADS,
    CROSSOVER_HEADS,
    MATCHED_HEADS,
    SCALES,
    Crossings,
    Matched,
    crossing_rows,
    crossover_rows,
    matched,
    matched_rows,
    teacher_crossovers,
)
from megatron_salt.study.analysis.economics import BREAK_EVEN_HEADS, SAVING_HEADS, break_even_rows, economics, saving_rows
from megatron_salt.study.analysis.ledger import (
    ACCOUNT_HEADS,
    CACHE_HEADS,
    FLOP_HEADS,
    SECOND_HEADS,
    PreparationOf,
    RunCost,
    account_rows,
    cache_rows,
    flop_rows,
    second_rows,
)
from megatron_salt.study.analysis.pairs import unusable
from megatron_salt.study.analysis.statistics import COMPARISON_HEADS, Comparison, comparison_rows
from megatron_salt.study.report.tables import Table, is_sound, run_table, switch_table
from megatron_salt.study.results import RunResult


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report."""

    name: str
    title: str
    exploratory: bool = False
    """Whether none of it answers the primary question"""
    words: tuple[str, ...] = ()
    """Paragraphs above its tables"""
    notes: tuple[str, ...] = ()
    """A list below them"""
    tables: tuple[Table, ...] = ()
    listing: str = ""
    """Text in a fixed width below them, such as a YAML file"""


def ends(arms: Sequence[Arm], figures: Sequence[str]) -> Section:
    """The last value of each figure of each arm: mean over its seeds, lowest and highest."""

    def cell(arm: Arm, figure: str) -> str:
        values = [found[max(found)] for curve in arm.curves if (found := curve.of_evaluations.get(figure, {}))]
        if not values:
            return "-"
        mean, low, high = (figure_text(value) for value in (math.fsum(values) / len(values), min(values), max(values)))
        return mean if len(values) == 1 else f"{mean} ({low} to {high})"

    rows = [[arm.name, str(len(arm.curves)), *(cell(arm, figure) for figure in figures)] for arm in arms]
    title = "Last value of each figure, mean over the seeds (lowest to highest); runs that cannot be compared stand alone"
    return Section(name="ends", title="At the end", tables=_some(Table("finals", title, ("arm", "seeds", *figures), rows)))


def differences(comparisons: Sequence[Comparison]) -> Section:
    """All comparisons at the last step, and every seed that is left out."""
    title = "Arm less the other, of the same seed, at the last step"
    words = (
        "Only a row with a verdict answers the primary question. All other rows are exploratory: they tell in how many seeds an arm was "
        "better, and give no verdict. Of many of them, some will differ by chance."
    )
    table = Table("comparisons", title, COMPARISON_HEADS, comparison_rows(comparisons))
    return Section(
        name="differences", title="Differences, seed by seed", words=(words,), notes=_told(comparisons), tables=_some(table)
    )


def curves(missing: Sequence[str]) -> Section:
    """missing: figures that STUDY.yaml asks for and no log has."""
    words = (f"In no run's log: {', '.join(missing)}.",) if missing else ()
    return Section(name="curves", title="Curves", exploratory=True, words=words)


def passing(passed: Sequence[Crossings]) -> Section:
    """When arms pass the other's final figures."""
    title = "Share of the other's whole run at the first evaluation that is better than its last"
    table = Table("crossings", title, CROSSING_HEADS, crossing_rows(passed))
    return Section(
        name="passing", title="Who passes whom, and when", exploratory=True, notes=_told(passed), tables=_some(table)
    )


def equal(
    preparation_of: PreparationOf, results: Sequence[RunResult], pairs: Sequence[tuple[str, str]], figures: Sequence[str]
) -> Section:
    """Each figure at equal steps, FLOPs and seconds. pairs: (label, arm that it is compared with)."""
    found = {
        figure: [matched(results, preparation_of, *pair, figure, scale) for scale in SCALES for pair in pairs]
        for figure in figures
    }
    tables = [
        Table(f"equal-{number}", f"{figure} of both runs of a seed where the one that ends first ends", MATCHED_HEADS,
              matched_rows(rows), folded=number > 0)
        for number, (figure, rows) in enumerate(found.items())
    ]  # fmt: skip
    diverged = [run for run in results if not unusable(run) and not is_sound(run, figures)]
    notes = [
        f"{run.label}, seed {run.seed}: its figures are not finite at its end; it ends here at its last finite one."
        for run in diverged
    ]
    told = _told([one for rows in found.values() for one in rows])
    title = "At equal steps, FLOPs and seconds"
    return Section(name="equal", title=title, exploratory=True, notes=(*notes, *told), tables=_some(*tables))


def crossover(results: Sequence[RunResult]) -> Section:
    """When students pass their teacher."""
    title = "First evaluation in which the student predicts more tokens than the teacher"
    table = Table("crossover", title, CROSSOVER_HEADS, crossover_rows(teacher_crossovers(results)))
    return Section(name="teacher", title="When a student passes its teacher", exploratory=True, tables=_some(table))


def payment(preparation_of: PreparationOf, passed: Sequence[Crossings]) -> Section:
    """What a teacher may cost. passed: the crossings of one figure."""
    found = [economics(one, preparation_of, unit) for one in passed for unit in ("flops", "seconds")]
    paid = [one for one in found if one is not None]
    tables = (
        Table("break-even", "What a teacher's training may cost", BREAK_EVEN_HEADS, break_even_rows(paid)),
        Table("savings", "Share saved up to the crossing", SAVING_HEADS, saving_rows(passed), folded=True),
    )
    words = tuple(f"{one}." for one in paid)
    return Section(name="economics", title="What a teacher may cost", exploratory=True, words=words, tables=_some(*tables))


def ledger(costs: Sequence[RunCost]) -> Section:
    """FLOPs and seconds under each account."""
    words = ("FLOPs are those of matrix products. Seconds are those of training steps. Evaluations are in no account.",)
    tables = (
        Table("ledger", "Mean over the finished runs of an arm", ACCOUNT_HEADS, account_rows(costs)),
        Table("ledger-flops", "FLOPs of each run, by phase", FLOP_HEADS, flop_rows(costs), folded=True),
        Table("ledger-seconds", "Seconds of each run, by phase", SECOND_HEADS, second_rows(costs), folded=True),
        Table(
            "ledger-cache", "Runs with a teacher's cache: what it spared them is in no account", CACHE_HEADS, cache_rows(costs)
        ),
    )
    return Section(name="costs", title="What the runs cost", words=words, tables=_some(*tables))


def switch(results: Sequence[RunResult]) -> Section:
    """The end of stage 1."""
    return Section(name="switch", title="The switch to stage 2", tables=_some(switch_table(results)))


def runs(results: Sequence[RunResult], figures: Sequence[str]) -> Section:
    """All runs, with the reasons of those that failed."""
    words = bad_runs(results, figures) or f"All {len(results)} runs finished, with finite figures."
    return Section(name="all-runs", title="Runs", words=(words,), tables=_some(run_table(results, figures)))


def bad_runs(results: Sequence[RunResult], figures: Sequence[str]) -> str:
    """Names the runs that cannot be compared; empty where there are none."""
    bad = [f"{run.label} seed {run.seed}" for run in results if not is_sound(run, figures)]
    if not bad:
        return ""
    return f"{len(bad)} of {len(results)} runs have failed, have not ended, or are not finite at their end: {', '.join(bad)}."


def _told(found: Sequence[Comparison] | Sequence[Crossings] | Sequence[Matched]) -> tuple[str, ...]:
    """What comparisons leave out, each line once."""
    return tuple(dict.fromkeys(f"Left out: {one.arm} against {one.against}, {line}." for one in found for line in one.told))


def _some(*tables: Table) -> tuple[Table, ...]:
    return tuple(table for table in tables if table.rows)
