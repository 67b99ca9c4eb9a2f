"""What the scores of a study chose for stage 1, and how much of it ties decided. Reads the selections that its runs name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_salt.errors import UserError
from megatron_salt.selection.selection_file import Selection
from megatron_salt.study.report.sections import Section
from megatron_salt.study.report.tables import Table
from megatron_salt.study.results import RunResult

HEADS = (
    "selection",
    "used by",
    "windows",
    "of",
    "share",
    "rule",
    "score",
    "of them decided by ties",
    "scored by the teacher of step",
)


def selection_section(results: Sequence[RunResult]) -> Section:
    """A row for each selection that a run of the study names. One that cannot be read is told."""
    users: dict[str, dict[str, None]] = {}
    for run in results:
        if run.config is not None and run.config.salt.stage1_selection is not None:
            users.setdefault(run.config.salt.stage1_selection, {})[run.label] = None
    rows, words = [], []
    for path, labels in users.items():
        try:
            rows.append(_row(path, list(labels)))
        except (UserError, OSError) as error:
            words.append(f"What {', '.join(labels)} draw stage 1 from is not known: {error}")
    table = Table("selections", "Windows of stage 1", HEADS, rows)
    return Section(name="selection", title="What the scores selected", words=tuple(words), tables=(table,) if rows else ())


def _row(path: str, labels: Sequence[str]) -> list[str]:
    manifest = Selection.open(path, "selection").manifest
    rule, ties = manifest.rule, manifest.tie_share
    return [
        Path(path).parent.name or path,
        ", ".join(labels),
        str(manifest.num_selected),
        str(manifest.num_samples),
        f"{manifest.num_selected / manifest.num_samples:.1%}",
        str(rule.get("name")),
        "-" if rule.get("name") == "random" else str(rule.get("score")),
        "not counted" if ties is None else f"{ties:.1%}",
        str(manifest.scores.teacher_step),
    ]
