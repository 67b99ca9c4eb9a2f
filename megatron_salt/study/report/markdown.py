"""A study's report as Markdown, to paste into a pull request: the answer, and all tables that the page does not fold.

Details are folded in HTML's elements for that, which Markdown passes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_salt.study.report.content import Report
from megatron_salt.study.report.sections import Section
from megatron_salt.study.report.tables import Table

_OPEN = ("ends", "differences", "passing", "all-runs")
"""Sections that are shown at once; the others open with a click."""


def to_markdown(report: Report, pictures: Sequence[str]) -> str:
    """The text of the file. pictures: names of files beside it, shown in the sections of curves and differences."""
    answer = report.answer
    verdict, _, rest = answer.sentence.partition(":")
    parts = [f"## {_plain(report.title)}", _plain(answer.question), f"**{_plain(verdict)}:** {_plain(rest)}"]
    parts += [_plain(text) for text in (answer.passing, answer.economics, answer.warning) if text]
    parts += [] if answer.accounts is None else [_table(answer.accounts)]
    parts += [f"![{_plain(name)}]({name})" for name in pictures]
    for section in report.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    tables = [table for table in section.tables if not table.folded]
    if not (tables or section.words or section.listing):
        return []
    parts = [f"### {_plain(section.title)}{' (exploratory)' if section.exploratory else ''}", *map(_plain, section.words)]
    parts += ["\n".join(f"- {_plain(note)}" for note in section.notes)] if section.notes else []
    parts += [text for table in tables for text in (f"{_plain(table.title)}:", _table(table))]
    fence = "```"
    while fence in section.listing:
        fence += "`"
    parts += [f"{fence}yaml\n{section.listing.rstrip()}\n{fence}"] if section.listing else []
    if section.name in _OPEN:
        return parts
    head, *rest = parts
    return [f"<details><summary>{head.removeprefix('### ')}</summary>", *rest, "</details>"]


def _table(table: Table) -> str:
    heads = [_plain(head) for head in table.heads]
    rule = [":--", *("--:" for _ in heads[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *([_plain(cell) for cell in row] for row in table.rows)))


def _plain(text: str) -> str:
    """Text on one line, of which Markdown takes no character for markup."""
    escaped = "".join(f"\\{character}" if character in "\\`*[]<>|#" else character for character in " ".join(text.split()))
    return escaped.replace("__", "\\_\\_")
