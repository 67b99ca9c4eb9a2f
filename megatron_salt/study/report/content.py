"""What a study's report says, before it takes the form of a page or of Markdown. Pure.

The answer to the primary question stands first, with what it costs under each account of the teacher. All other comparisons are exploratory
and labelled so. Nothing is left out in silence: failed runs, runs whose numbers are not finite, and seeds without a partner are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.metrics.arms import Arm
from megatron_salt.study.analysis.crossings import Crossings, Scale, crossings
from megatron_salt.study.analysis.economics import economics
from megatron_salt.study.analysis.ledger import ACCOUNT_WORDS, ACCOUNTS, RunCost, costs_of
from megatron_salt.study.analysis.statistics import Comparison, Verdict, compare
from megatron_salt.study.report import sections as parts
from megatron_salt.study.report.facts import StudyFacts
from megatron_salt.study.report.sections import Section
from megatron_salt.study.report.tables import Table, is_sound
from megatron_salt.study.results import RunResult


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What stands on the first screen."""

    question: str
    verdict: Verdict | None
    """None: no primary question, or no run of one of its arms"""
    sentence: str
    """The verdict with its interval and its number of seeds; what is left out"""
    passing: str
    """When the arm of the question passes the other's final figure, by steps; empty where there is nothing to say"""
    economics: str
    """What the teacher may cost; empty where there is nothing to say"""
    accounts: Table | None
    """The same under each account of the teacher"""
    warning: str
    """Tells of runs that cannot be compared; empty where there are none"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report. A page adds plots: `curves` to the section "curves", `comparisons` to the section "differences"."""

    title: str
    answer: Answer
    figures: tuple[str, ...]
    """Those that some run has, that of the question first"""
    curves: tuple[tuple[Arm, RunResult], ...]
    """An arm for each label with its sound runs, and each other run with a log as an arm of its own; beside it one of its runs"""
    comparisons: tuple[Comparison, ...]
    sections: tuple[Section, ...]
    results: tuple[RunResult, ...]
    costs: tuple[RunCost, ...]


def report_of(facts: StudyFacts, results: Sequence[RunResult], selections: Section) -> Report:
    """The report of a study. selections: what is known of the windows that its runs draw stage 1 from, see selections.py.

    Raises UserError where two runs have one label and one seed."""
    wanted = _figures(facts)
    figures = tuple(name for name in wanted if any(run.curve and name in run.curve.of_evaluations for run in results))
    figures = figures or wanted[:1]
    pairs = _pairs(facts, results)
    primary = None if facts.primary is None else (facts.primary.arm, facts.primary.against, facts.primary.figure)
    comparisons = [
        compare(results, arm, other, figure, primary=(arm, other, figure) == primary)
        for figure in figures
        for arm, other in pairs
    ]
    passed = [crossings(results, facts.preparation_of, arm, other, figure) for figure in figures for arm, other in pairs]
    own = next((one for one in passed if (one.arm, one.against, one.figure) == primary), None)
    costs, arms = costs_of(results, facts.preparation_of), _arms(results, figures)
    return Report(
        title=f"Study {facts.name}",
        answer=_answer(facts, comparisons, own, parts.bad_runs(results, figures)),
        figures=figures,
        curves=tuple(arms),
        comparisons=tuple(comparisons),
        sections=(
            parts.ends([arm for arm, _ in arms], figures),
            parts.differences(comparisons),
            parts.curves([name for name in wanted if name not in figures]),
            parts.passing(passed),
            parts.equal(facts.preparation_of, results, pairs, figures),
            parts.crossover(results),
            parts.payment(facts.preparation_of, [one for one in passed if one.figure == figures[0]]),
            parts.ledger(costs),
            parts.switch(results),
            selections,
            parts.runs(results, figures),
            Section(name="study", title="The study", words=facts.machine, listing=facts.definition),
        ),
        results=tuple(results),
        costs=tuple(costs),
    )


def _figures(facts: StudyFacts) -> tuple[str, ...]:
    figures = facts.figures
    first = () if facts.primary is None else (facts.primary.figure,)
    return tuple(dict.fromkeys((*first, *figures.in_domain, *figures.out_of_domain, *figures.tasks)))


def _pairs(facts: StudyFacts, results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """(label, arm that it is compared with) for all other arms. That is the one of the question, else the first baseline; empty where it
    has no run. A run with settings is compared with one that has them too, where there is one: see `pair_runs`."""
    arms = [run.arm for run in results if run.kind == "baseline"] if facts.primary is None else [facts.primary.against]
    against = next((arm for arm in arms if any(run.arm == arm for run in results)), None)
    labels = dict.fromkeys(run.label for run in results if run.arm != against)
    return [] if against is None else [(label, against) for label in labels]


def _arms(results: Sequence[RunResult], figures: Sequence[str]) -> list[tuple[Arm, RunResult]]:
    sound: dict[str, list[RunResult]] = {}
    alone: list[tuple[Arm, RunResult]] = []
    for run in results:
        if is_sound(run, figures):
            sound.setdefault(run.label, []).append(run)
        elif run.curve is not None:
            state = "not finite" if run.state == "finished" else run.state
            alone.append((Arm(f"{run.label}, seed {run.seed} ({state})", (run.curve,)), run))
    together = [(Arm(label, tuple(run.curve for run in runs if run.curve)), runs[0]) for label, runs in sound.items()]
    return together + alone


def _answer(facts: StudyFacts, comparisons: Sequence[Comparison], passed: Crossings | None, warning: str) -> Answer:
    own, primary = next((one for one in comparisons if one.primary), None), facts.primary
    if primary is None:
        question = "This study asks no primary question: all that it shows is exploratory."
        sentence = "No answer: STUDY.yaml names no primary question."
    else:
        question = f"Is {primary.arm} better than {primary.against} in {primary.figure} at the last step?"
        sentence = (
            str(own) if own else f"No answer yet: no run of {primary.arm} and {primary.against} with this figure to compare."
        )
    known = passed is not None and bool(passed.seeds)
    paid = None if passed is None else economics(passed, facts.preparation_of, "flops")
    return Answer(
        question=question,
        verdict=None if own is None else own.verdict,
        sentence=sentence,
        passing=f"{passed}." if known else "",
        economics="" if paid is None else f"{paid}.",
        accounts=_accounts(passed) if passed is not None and known else None,
        warning=warning,
    )


def _accounts(own: Crossings) -> Table:
    rows = [
        [
            ACCOUNT_WORDS[account],
            own.summary(Scale("flops", account)),
            own.summary(Scale("seconds", account)),
        ]
        for account in ACCOUNTS
    ]
    title = f"The same in shares of the FLOPs and seconds of {own.against}'s whole run, seed by seed"
    return Table("accounts", title, ("account", "FLOPs", "seconds"), rows)
