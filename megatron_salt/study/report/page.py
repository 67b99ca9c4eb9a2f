"""A study's report as one HTML page: the answer, what it costs and the main curve on the first screen, then all else.

It needs no network, see metrics/html_parts.py. Plotly is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_salt.metrics.arms import Arm
from megatron_salt.metrics.figures import COLOURS
from megatron_salt.metrics.html_parts import Plot, axis_switch, document, scripts, table
from megatron_salt.metrics.page import Horizontal, curve_plot, empty_figure
from megatron_salt.study.analysis.crossings import Unit
from megatron_salt.study.analysis.ledger import Account, PreparationOf, total_before
from megatron_salt.study.analysis.statistics import Comparison
from megatron_salt.study.report.content import Answer, Report
from megatron_salt.study.report.pictures import arms_with, better_side, by_figure
from megatron_salt.study.report.sections import Section
from megatron_salt.study.report.tables import Table
from megatron_salt.study.results import RunResult

_AXES: tuple[tuple[str, Unit, Account, str], ...] = (
    ("steps", "steps", "existed", "steps"),
    ("flops", "flops", "existed", "FLOPs"),
    ("flops-trained", "flops", "trained", "FLOPs with the teacher's training"),
    ("seconds", "seconds", "existed", "seconds"),
    ("seconds-trained", "seconds", "trained", "seconds with the teacher's training"),
)


def to_html(report: Report, preparation_of: PreparationOf) -> str:
    """The text of the page."""
    axes = _axes(report.curves, preparation_of)
    curves = [plot for number, figure in enumerate(report.figures) if (plot := _curves(report, number, figure, axes))]
    differences = [
        _differences(f"difference-{number}", group) for number, group in enumerate(by_figure(report.comparisons).values())
    ]
    words = {name: axis.words for name, axis in axes.items()}
    main, others = curves[:1], curves[1:]
    plots = {"curves": others, "differences": differences}
    switches = {"curves": axis_switch(words, "steps", "axis-below")} if others else {}
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f"<div class='first'><div>{_answer(report.answer)}</div><div>",
        *(plot.to_html() for plot in main),
        axis_switch(words, "steps") if main else "",
        "</div></div>",
        *(_section(section, switches.get(section.name, ""), plots.get(section.name, [])) for section in report.sections),
        scripts([*curves, *differences]),
    ]
    return document(report.title, parts)


def _answer(answer: Answer) -> str:
    verdict, _, rest = answer.sentence.partition(":")
    parts = [
        f"<p>{escape(answer.question)}</p>",
        f"<p id='answer'><strong>{escape(verdict)}:</strong>{escape(rest)}</p>",
        f"<p>{escape(answer.passing)}</p>" if answer.passing else "",
        "" if answer.accounts is None else _table(answer.accounts),
        f"<p>{escape(answer.economics)}</p>" if answer.economics else "",
        f"<p class='warning'><strong>Note:</strong> {escape(answer.warning)} See <a href='#all-runs'>Runs</a>.</p>"
        if answer.warning
        else "",
    ]
    return "".join(parts)


def _section(section: Section, switch: str, plots: Sequence[Plot]) -> str:
    if not (section.words or section.tables or section.listing or plots):
        return ""
    label = " <small>exploratory</small>" if section.exploratory else ""
    parts = [
        f"<section id='{section.name}'><h2>{escape(section.title)}{label}</h2>",
        *(f"<p>{escape(text)}</p>" for text in section.words),
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in section.notes)}</ul>" if section.notes else "",
        switch,
        *(plot.to_html() for plot in plots),
        *(_table(one) for one in section.tables),
        f"<pre tabindex='0'>{escape(section.listing)}</pre>" if section.listing else "",
        "</section>",
    ]
    return "\n".join(parts)


def _table(one: Table) -> str:
    text = table(one.name, one.heads, one.rows, one.title)
    return f"<details><summary>{escape(one.title)}</summary>{text}</details>" if one.folded else text


# --- plots ------------------------------------------------------------------------------------------------------------


def _axes(curves: Sequence[tuple[Arm, RunResult]], preparation_of: PreparationOf) -> dict[str, Horizontal]:
    """The axes that all arms have. One that differs from another in nothing is left out."""
    found: dict[str, Horizontal] = {}
    for name, axis, account, words in _AXES:
        if axis == "flops" and any(curve.flops is None for arm, _ in curves for curve in arm.curves):
            continue
        if axis == "seconds" and not all(curve.is_whole for arm, _ in curves for curve in arm.curves):
            continue
        starts = [_start(run, axis, account, preparation_of) for _, run in curves]
        known = tuple(start for start in starts if start is not None)
        if len(known) == len(starts) and not any(one.axis == axis and one.before == known for one in found.values()):
            found[name] = Horizontal(axis, words, known)
    return found


def _start(run: RunResult, unit: Unit, account: Account, preparation_of: PreparationOf) -> float | None:
    """What was done before a run's first step; None: not known."""
    return 0.0 if unit == "steps" else total_before(run.kind, preparation_of(run), account, unit)


def _curves(report: Report, number: int, figure: str, axes: dict[str, Horizontal]) -> Plot | None:
    kept = arms_with(report, figure)
    if not kept:
        return None
    of_kept = {
        name: Horizontal(axis.axis, axis.words, tuple(axis.before[place] for place in kept)) for name, axis in axes.items()
    }
    return curve_plot(f"curve-{number}", [report.curves[place][0] for place in kept], (figure,), of_kept)


def _differences(name: str, group: Sequence[Comparison]) -> Plot:
    """A dot for each seed, a bar at the mean, and the interval where there is one."""
    figure, side = group[0].figure, better_side(group[0].figure)
    plot = empty_figure(
        margin={"l": 10, "r": 10, "t": 10, "b": 50}, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    for one in group:
        label = escape(f"{one.arm} - {one.against}")
        colour = COLOURS[0 if one.primary else -1]
        seeds: dict[str, Any] = {
            "mode": "markers",
            "marker": {"size": 9, "color": colour, "opacity": 0.75},
            "showlegend": False,
        }
        plot.add_scatter(
            x=list(one.differences), y=[label] * len(one.seeds), text=[f"seed {seed}" for seed in one.seeds], **seeds
        )
        bar: dict[str, Any] = {"symbol": "line-ns-open", "size": 18, "color": colour, "line": {"width": 3}}
        spread: dict[str, Any] = {"name": "mean, exploratory: no interval", "showlegend": False}
        if one.interval is not None and one.mean is not None:
            error = {
                "array": [one.interval[1] - one.mean],
                "arrayminus": [one.mean - one.interval[0]],
                "color": colour,
                "thickness": 2,
            }
            spread = {"name": "mean and 95% interval of the primary question", "error_x": error, "showlegend": True}
        plot.add_scatter(x=[one.mean], y=[label], mode="markers", marker=bar, **spread)
    plot.add_vline(x=0, line_color="#1a1a1a", line_width=1, line_dash="dash")
    plot.update_xaxes(title=f"{escape(figure)}<br>difference; {side} 0 is better", zeroline=False)
    plot.update_yaxes(automargin=True, autorange="reversed", type="category")
    told = "; ".join(
        f"{one.arm} less {one.against}: {', '.join(f'{value:+.4f}' for value in one.differences)}" for one in group
    )
    return Plot(
        name, {"all": plot}, f"{figure}, a dot for each seed; {side} 0 is better. {told}.", f"{100 + 40 * len(group)}px"
    )
