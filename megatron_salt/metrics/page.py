"""A comparison of runs as one HTML page that needs no network: Plotly's JavaScript is inside, and figures also stand in tables.

Plotly is an optional dependency. Nothing is imported from it before a page is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_salt.metrics.arms import Arm, Passing, finals
from megatron_salt.metrics.figures import (
    COLOURS,
    RUN_HEADS,
    X_WORDS,
    Panel,
    axis_title,
    end_words,
    lines_of,
    notes_on,
    run_rows,
    shows_losses,
    switches_of,
)
from megatron_salt.metrics.history import Axis
from megatron_salt.metrics.html_parts import Plot, axis_switch, document, scripts, table

MOST_POINTS = 500
"""Of one line: a longer one is thinned, so that the page stays small."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
"""Arms differ by dash and mark too, for readers who cannot tell the colours apart."""


def write_page(
    arms: Sequence[Arm], panels: Sequence[Panel], passed: Sequence[Passing], x: Axis, unigram: float | None, output: Path
) -> None:
    """Write the page. Raises OSError, and UserError where an arm lacks a figure.

    x: the axis that is shown first; the page can switch to the others."""
    figures = list(dict.fromkeys(figure for panel in panels for figure in panel))
    curves = [curve for arm in arms for curve in arm.curves]
    axes: dict[str, Horizontal] = {axis: Horizontal(axis, X_WORDS[axis]) for axis in axes_of(arms)}
    plots = [curve_plot(f"panel-{number}", arms, panel, axes, unigram) for number, panel in enumerate(panels)]
    parts = [
        "<h1>Comparison of runs</h1>",
        axis_switch({name: axis.words for name, axis in axes.items()}, x),
        *(plot.to_html() for plot in plots),
        "<h2>At the end</h2>",
        table("finals", ("arm", "seeds", *figures), finals(arms, figures)),
        "<h2>Who passed whom</h2>" if passed else "",
        *(f"<p class='passing'>{escape(str(one))}</p>" for one in passed),
        "<h2>Runs</h2>",
        table("runs", RUN_HEADS, run_rows(curves)),
        *(f"<p>{escape(note)}</p>" for curve in curves for note in notes_on(curve)),
        "" if unigram is None else f"<p>unigram entropy of held-out tokens: {unigram:.4f}</p>",
        scripts(plots),
    ]
    output.write_text(document("Comparison of runs", parts), encoding="utf-8")


def axes_of(arms: Sequence[Arm]) -> list[Axis]:
    """The axes that all runs have: FLOPs only where every log tells them."""
    known = all(curve.flops is not None for arm in arms for curve in arm.curves)
    return [axis for axis in get_args(Axis) if axis != "flops" or known]


@dataclass(frozen=True)
class Horizontal:
    """A horizontal axis of a page."""

    axis: Axis
    words: str
    before: tuple[float, ...] = ()
    """Where each arm begins, such as the FLOPs of its teacher's training; empty: all at 0"""


def curve_plot(
    name: str, arms: Sequence[Arm], panel: Panel, axes: Mapping[str, Horizontal], unigram: float | None = None
) -> Plot:
    """A panel on each axis. UserError where an arm lacks a figure."""
    ends = "; ".join(f"{line.label} {end_words(line)}" for line in lines_of(arms, panel, "steps"))
    caption = f"{axis_title(panel)[:1].upper()}{axis_title(panel)[1:]}. At the end: {ends}."
    return Plot(name, {key: _figure(arms, panel, axis, unigram) for key, axis in axes.items()}, caption)


def empty_figure(**layout: Any) -> Any:
    """A Plotly figure without data, in the style of all our plots."""
    from plotly import graph_objects

    style: dict[str, Any] = {
        "template": "plotly_white", "hovermode": "closest", "font": {"size": 13, "color": "#1a1a1a"},
        "margin": {"l": 60, "r": 10, "t": 30, "b": 50}, "showlegend": True,
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "traceorder": "normal", "uirevision": "kept"},
    }  # fmt: skip
    return graph_objects.Figure(layout=style | layout)


def _figure(arms: Sequence[Arm], panel: Panel, x: Horizontal, unigram: float | None) -> Any:
    plot, before = empty_figure(), x.before or (0.0,) * len(arms)
    for line in lines_of(arms, panel, x.axis):
        kept = np.unique(np.linspace(0, len(line.at) - 1, min(len(line.at), MOST_POINTS)).astype(np.int64))
        at, value, low, high = (
            [_number(one) for one in values[kept]] for values in (line.at + before[line.arm], line.value, line.low, line.high)
        )
        colour = COLOURS[line.arm % len(COLOURS)]
        if low != high:
            edges: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
            plot.add_scatter(x=at, y=low, **edges)
            plot.add_scatter(x=at, y=high, fill="tonexty", fillcolor=f"{colour}22", **edges)
        style: dict[str, Any] = {"mode": "lines", "line": {"color": colour, "dash": DASHES[line.arm % len(DASHES)]}}
        if not line.of_steps:
            style |= {"mode": "lines+markers", "marker": {"symbol": MARKS[(line.arm + 3 * line.place) % len(MARKS)], "size": 7}}
        plot.add_scatter(x=at, y=value, name=escape(line.label), **style)
    ends = [(position + before[number], number) for number, _, position in switches_of(arms, x.axis)]
    for position, number in ends:
        plot.add_vline(
            x=position, line={"dash": DASHES[number % len(DASHES)], "color": COLOURS[number % len(COLOURS)], "width": 1.5}
        )
    if ends:  # one text: those of several arms would lie on each other
        text = {"text": "stage 1 ends", "textangle": -90, "font": {"size": 11}, "showarrow": False}
        plot.add_annotation(x=min(ends)[0], y=1, yref="paper", xanchor="right", yanchor="top", **text)
    if unigram is not None and shows_losses(panel):
        plot.add_hline(y=unigram, line_dash="dot", line_color="gray", annotation_text="unigram entropy of held-out tokens")
    plot.update_xaxes(title=x.words, rangemode="tozero")
    plot.update_yaxes(title=axis_title(panel))
    return plot


def _number(value: np.float64) -> float | None:
    return float(value) if np.isfinite(value) else None
