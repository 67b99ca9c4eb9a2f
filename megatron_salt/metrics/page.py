"""A comparison of runs as one HTML page that needs no network: Plotly's JavaScript is inside, and figures also stand in tables.

Plotly is an optional dependency. Nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.files import whole_file
from megatron_salt.metrics.arms import Arm, Passing, finals
from megatron_salt.metrics.figures import RUN_HEADS, X_WORDS, Panel, axis_title, lines_of, notes_on, run_rows, switches_of
from megatron_salt.metrics.history import Axis

MOST_POINTS = 2000
"""Of one line: a longer one is thinned, so that the page stays small."""

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
)


def write_page(
    arms: Sequence[Arm], panels: Sequence[Panel], passed: Sequence[Passing], x: Axis, unigram: float | None, output: Path
) -> None:
    """Write the page. It appears whole or not at all. UserError where an arm lacks a figure."""
    figures = list(dict.fromkeys(figure for panel in panels for figure in panel))
    curves = [curve for arm in arms for curve in arm.curves]
    plots = [_plot(arms, panel, x, unigram) for panel in panels]
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Comparison of runs</title><style>{_STYLE}</style></head><body>",
        "<h1>Comparison of runs</h1>",
        *(
            plot.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f"panel-{number}", config={"displaylogo": False})
            for number, plot in enumerate(plots)
        ),
        "<h2>At the end</h2>",
        _table("finals", ("arm", "seeds", *figures), finals(arms, figures)),
        "<h2>Who passed whom</h2>" if passed else "",
        *(f"<p class='passing'>{escape(str(one))}</p>" for one in passed),
        "<h2>Runs</h2>",
        _table("runs", RUN_HEADS, run_rows(curves)),
        *(f"<p>{escape(note)}</p>" for curve in curves for note in notes_on(curve)),
        "" if unigram is None else f"<p>unigram entropy of held-out tokens: {unigram:.4f}</p>",
        "</body></html>\n",
    ]
    with whole_file(output) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _plot(arms: Sequence[Arm], panel: Panel, x: Axis, unigram: float | None) -> Any:
    from plotly import graph_objects

    plot = graph_objects.Figure(layout={"template": "plotly_white", "height": 480, "hovermode": "closest"})
    for line in lines_of(arms, panel, x):
        kept = np.unique(np.linspace(0, len(line.at) - 1, min(len(line.at), MOST_POINTS)).astype(np.int64))
        at, value, low, high = ([_number(one) for one in values[kept]] for values in (line.at, line.value, line.low, line.high))
        colour = _COLOURS[line.arm % len(_COLOURS)]
        if low != high:
            edges: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
            plot.add_scatter(x=at, y=low, **edges)
            plot.add_scatter(x=at, y=high, fill="tonexty", fillcolor=f"{colour}33", **edges)
        style: dict[str, Any] = {"mode": "lines", "line": {"color": colour}}
        if not line.of_steps:
            style = {"mode": "lines+markers", "line": {"color": colour, "dash": "dot"}, "marker": {"symbol": line.place}}
        plot.add_scatter(x=at, y=value, name=escape(line.label), **style)
    for number, label, position in switches_of(arms, x):
        plot.add_vline(x=position, line_dash="dash", line_color=_COLOURS[number % len(_COLOURS)], annotation_text=escape(label))
    if unigram is not None and axis_title(panel).startswith("loss"):
        plot.add_hline(y=unigram, line_dash="dot", line_color="gray", annotation_text="unigram entropy of held-out tokens")
    plot.update_xaxes(title=X_WORDS[x])
    plot.update_yaxes(title=axis_title(panel))
    plot.update_layout(showlegend=True, legend_traceorder="normal")
    return plot


def _number(value: np.float64) -> float | None:
    return float(value) if np.isfinite(value) else None


def _table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table id='{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
