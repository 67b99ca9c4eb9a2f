"""Tables of a report that no other module has: the state of the runs, the switch to stage 2, and CSV rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.study.analysis.ledger import ACCOUNTS, RunCost
from megatron_salt.study.analysis.pairs import unusable
from megatron_salt.study.results import RunResult

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    name: str
    """Unique in the report; the id of the table in the page"""
    title: str
    heads: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether the page shows the title alone until one opens it, and Markdown leaves it out"""


def final_value(run: RunResult, figure: str) -> float | None:
    """The last value of a figure of evaluations, nan where that was not finite; None where the log lacks it."""
    values = {} if run.curve is None else run.curve.of_evaluations.get(figure, {})
    return values[max(values)] if values else None


def not_finite_from(run: RunResult) -> int | None:
    """The first step whose training loss was not finite; None: all were, or no step is logged."""
    if run.curve is None:
        return None
    bad = run.curve.steps[~np.isfinite(run.curve.losses)]
    return int(bad[0]) if len(bad) else None


def is_sound(run: RunResult, figures: Sequence[str]) -> bool:
    """Whether a run has ended as planned, and all of these figures that it has are finite at its end."""
    finals = [value for figure in figures if (value := final_value(run, figure)) is not None]
    return not unusable(run) and all(map(math.isfinite, finals))


def run_table(results: Sequence[RunResult], figures: Sequence[str]) -> Table:
    """Every run, with its state and reason: first those that cannot be compared."""
    rows = []
    for run in sorted(results, key=lambda run: is_sound(run, figures)):
        bad, curve = not_finite_from(run), run.curve
        finals = [final_value(run, figure) for figure in figures]
        rows.append(
            [
                run.label,
                str(run.seed),
                run.state,
                "-" if curve is None else str(curve.steps[-1]),
                *("-" if value is None else figure_text(value) for value in finals),
                "-" if bad is None else f"step {bad}",
                run.reason or unusable(run) or ("-" if is_sound(run, figures) else "a figure is not finite at its end"),
            ]
        )
    heads = ("run", "seed", "state", "last step", *(f"last {figure}" for figure in figures), "loss not finite from", "reason")
    return Table("runs", "All runs; those that cannot be compared come first", heads, rows)


SWITCH_HEADS = (
    "run", "seed", "stage 1 ends after", "GiB in use before", "after the teacher is freed", "median step of stage 1", "of stage 2",
    "stage 1 / stage 2",
)  # fmt: skip


def switch_table(results: Sequence[RunResult]) -> Table:
    """Memory and step time before and after the end of stage 1, of the runs that have one."""
    rows = []
    for run in results:
        curve = run.curve
        if curve is None or curve.switch is None:
            continue
        switch, seconds = curve.switch, np.diff(curve.seconds, prepend=0.0)
        parts = seconds[curve.steps <= switch.step], seconds[curve.steps > switch.step]
        medians = [float(np.median(part)) if len(part) else math.nan for part in parts]
        times = ["-" if math.isnan(median) else f"{1000 * median:.4g} ms" for median in medians]
        ratio = medians[0] / medians[1] if medians[1] > 0 else math.nan
        memory = ["-" if gib is None else f"{gib:.3f}" for gib in (switch.gib_before, switch.gib_after)]
        rows.append(
            [run.label, str(run.seed), f"step {switch.step}", *memory, *times, "-" if math.isnan(ratio) else f"{ratio:.3f}"]
        )
    return Table("switch", "Memory in use and time of a step, before and after the end of stage 1", SWITCH_HEADS, rows)


# --- CSV --------------------------------------------------------------------------------------------------------------


def run_records(results: Sequence[RunResult], costs: Sequence[RunCost]) -> list[Mapping[str, Cell]]:
    """One {column: cell} a run. None: not known, or not in the run."""
    records: list[Mapping[str, Cell]] = []
    for run, cost in zip(results, costs, strict=True):
        curve = run.curve
        switch = None if curve is None else curve.switch
        record: dict[str, Cell] = _names(run) | {
            "state": run.state,
            "reason": run.reason,
            "last_step": None if curve is None else int(curve.steps[-1]),
            "tokens": None if curve is None else int(curve.tokens[-1]),
            "not_finite_from_step": not_finite_from(run),
            "peak_gib": None if curve is None else curve.peak_gib,
            "stage1_last_step": None if switch is None else switch.step,
            "gib_before_switch": None if switch is None else switch.gib_before,
            "gib_after_switch": None if switch is None else switch.gib_after,
        }
        record |= {f"flops, {phase}": value for phase, value in (cost.flops or {}).items()}
        record |= {f"seconds, {phase}": value for phase, value in {**(cost.seconds or {}), **cost.beside}.items()}
        for account in ACCOUNTS:
            record |= {
                f"flops, teacher {account}": cost.total("flops", account),
                f"seconds, teacher {account}": cost.total("seconds", account),
            }
        names = [] if curve is None else list(curve.of_evaluations)
        records.append(record | {f"last {name}": final_value(run, name) for name in names} | {"directory": str(run.directory)})
    return records


def evaluation_records(results: Sequence[RunResult]) -> list[Mapping[str, Cell]]:
    """One {column: cell} for each step of a run after which something was evaluated."""
    records: list[Mapping[str, Cell]] = []
    for run in results:
        curve = run.curve
        if curve is None:
            continue
        for step in sorted({step for values in curve.of_evaluations.values() for step in values}):
            at = np.array([step])
            record: dict[str, Cell] = _names(run) | {
                "step": step,
                "tokens": int(curve.when("tokens", at)[0]),
                "seconds": float(curve.when("seconds", at)[0]),
                "flops": None if curve.flops is None else float(curve.when("flops", at)[0]),
            }
            records.append(record | {name: values[step] for name, values in curve.of_evaluations.items() if step in values})
    return records


def _names(run: RunResult) -> dict[str, Cell]:
    return {"arm": run.arm, "kind": run.kind, "seed": run.seed, "label": run.label, **run.settings}


def cell_text(cell: Cell) -> str:
    """A cell of a CSV file: every digit of a number, nothing for None."""
    return "" if cell is None else repr(cell) if isinstance(cell, float) else str(cell)
