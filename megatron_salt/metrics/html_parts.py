"""Parts of an HTML page that needs no network: the frame of the page, tables, and plots whose horizontal axis can be switched.

A plot has one Plotly figure for each axis; radio buttons at its top choose for all plots of the page. The page is readable on a phone, with
a keyboard alone, printed, and without colours: lines differ by dash and mark too. Plotly, an optional dependency, is imported when used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;max-width:70em;padding:1em}
h1{font-size:1.5em;line-height:1.25;margin:.2em 0 .6em}h2{font-size:1.2em;margin:1.8em 0 .4em}h3{font-size:1em;margin:1.2em 0 .3em}
.scroll{overflow-x:auto;margin:.6em 0}table{border-collapse:collapse}caption{text-align:left;padding:.3em 0;color:#444}
ul{padding-left:1.2em}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ccc;white-space:nowrap}thead th{vertical-align:bottom}
td:first-child,th:first-child{text-align:left}tbody th{font-weight:normal}
figure{margin:1em 0}figcaption{color:#444;font-size:.92em}.plot{height:420px}
fieldset{border:1px solid #767676;border-radius:.3em;margin:1em 0;padding:.2em .8em}label{display:inline-block;padding:.35em 1em .35em 0}
:focus-visible{outline:3px solid #0072b2;outline-offset:2px}pre{overflow-x:auto;background:#f4f4f4;padding:.8em}
.first{display:grid;gap:0 2em;grid-template-columns:minmax(0,1fr)}.first td,.first tbody th{white-space:normal}.first .plot{height:355px}
#answer{font-size:1.2em;line-height:1.35;border-left:.3em solid #0072b2;padding-left:.7em}
.warning{border-left:.3em solid #d55e00;padding-left:.7em}
h2 small{font-weight:normal;border:1px solid #767676;border-radius:.3em;padding:0 .4em}
summary{cursor:pointer;padding:.3em 0}section{scroll-margin-top:1em}
@media(min-width:64em){.first{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}body{max-width:80em}}
@media(max-width:40em){body{padding:.6em;font-size:15px}.plot,.first .plot{height:400px}td,th{padding:.25em .45em}}
@media print{
.scroll,pre{overflow:visible}fieldset,.modebar{display:none!important}figure,tr{break-inside:avoid}
.first{display:block}td,th{white-space:normal;padding:.2em .4em}
body{max-width:none;font-size:11px}}
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
function drawAll(axis) {
  for (const [name, byAxis] of Object.entries(figures)) {
    const figure = byAxis[axis] || Object.values(byAxis)[0];
    Plotly.react(name, figure.data, figure.layout, {displaylogo: false, responsive: true});
  }
}
const choices = [...document.querySelectorAll(".axis input")];
function choose(axis) {
  choices.forEach(choice => { choice.checked = choice.value === axis; });
  drawAll(axis);
}
choices.forEach(choice => choice.addEventListener("change", () => choose(choice.value)));
function resizeAll(size) {
  Object.keys(figures).forEach(name => Plotly.relayout(name, size));
}
addEventListener("beforeprint", () => resizeAll({autosize: false, width: 680}));
addEventListener("afterprint", () => resizeAll({autosize: true, width: null}));
choose((choices.find(choice => choice.checked) || {}).value);
"""


@dataclass(frozen=True)
class Plot:
    """A plot of a page."""

    name: str
    """id of its element"""
    by_axis: Mapping[str, Any]
    """{axis: Plotly figure}; a plot that has no time axis has one entry of any name, which the switch leaves alone"""
    caption: str
    """What it shows, in words: also the text for those who cannot see it"""
    height: str = ""
    """In CSS; empty: that of all plots"""

    def to_html(self) -> str:
        """The place of the plot. `scripts` draws it."""
        label = f"{self.name}-caption"
        style = f" style='height:{self.height}'" if self.height else ""
        return (
            f"<figure><div class='plot' id='{self.name}'{style} role='group' aria-labelledby='{label}'></div>"
            f"<figcaption id='{label}'>{escape(self.caption)}</figcaption></figure>"
        )


def document(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, which are HTML."""
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width,initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            *(part for part in parts if part),
            "</main></body></html>\n",
        ]
    )


def table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls sideways where the page is too narrow for it. The first cell of a row is its head."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr><th scope='row'>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption or name)}'>"
        f"<table id='{name}'>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def axis_switch(words: Mapping[str, str], chosen: str, group: str = "axis") -> str:
    """Radio buttons for the horizontal axis of all plots; nothing where there is one axis.

    words: {name of the axis, a key of `Plot.by_axis`: what it is called}. group: name of the buttons; several groups on a page move
    together.
    """
    if len(words) < 2:
        return ""
    buttons = "".join(
        f"<label><input type='radio' name='{group}' value='{axis}'{' checked' if axis == chosen else ''}> {escape(called)}</label>"
        for axis, called in words.items()
    )
    return f"<fieldset class='axis'><legend>Horizontal axis of the curves</legend>{buttons}</fieldset>"


def scripts(plots: Sequence[Plot]) -> str:
    """Plotly's JavaScript, the data of the plots, and what draws them. Stands at the end of the page."""
    from plotly.offline import get_plotlyjs

    figures = {plot.name: {axis: figure.to_plotly_json() for axis, figure in plot.by_axis.items()} for plot in plots}
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"<script>{get_plotlyjs()}</script>\n<script type='application/json' id='figures'>{data}</script>\n<script>{_SCRIPT}</script>"
