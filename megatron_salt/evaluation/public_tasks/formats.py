"""The public data sets that become task files, and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.errors import UserError
from megatron_salt.evaluation.public_tasks import prompts
from megatron_salt.evaluation.public_tasks.prompts import Record, Values
from megatron_salt.evaluation.public_tasks.rows import Row, read_labels, read_rows
from megatron_salt.evaluation.task_file import example_of, form_of


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one data set is read."""

    record: Callable[[Values], Record]
    """A row to a line of a task file."""
    label: str | None = None
    """The name under which a label from a file of its own joins its row; None: labels stand in the rows."""
    columns: tuple[str, ...] = ()
    """Of its CSV, which has no header; empty: it has one."""
    by_article: bool = False
    """Whether several rows make one line."""


FORMATS: Mapping[str, Format] = {
    "hellaswag": Format(record=prompts.hellaswag, label="label"),
    "piqa": Format(record=prompts.piqa, label="label"),
    "arc": Format(record=prompts.arc),
    "openbookqa": Format(record=prompts.openbookqa),
    "commonsense_qa": Format(record=prompts.commonsense_qa),
    "siqa": Format(record=prompts.siqa, label="label"),
    "boolq": Format(record=prompts.boolq),
    "winogrande": Format(record=prompts.winogrande, label="answer"),
    "lambada": Format(record=prompts.lambada),
    "sciq": Format(record=prompts.sciq),
    "mmlu": Format(record=prompts.mmlu, columns=("question", "A", "B", "C", "D", "answer")),
    "race": Format(record=prompts.race, by_article=True),
}


def task_lines(name: str, inputs: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The lines of the task file of a data set. inputs: its files. labels: for each of them the file of its labels, or nothing.

    Raises UserError, which names the file and the line.
    """
    form = FORMATS[name]
    if labels and form.label is None:
        raise UserError(f"--labels: the labels of {name} stand in its own files")
    if labels and len(labels) != len(inputs):
        raise UserError(f"--labels names {len(labels)} files, --input {len(inputs)}; give one for each, in the same order")
    lines = []
    for number, path in enumerate(inputs):
        rows = read_rows(path, form.columns, text_is_json=form.by_article)
        if labels:
            rows = _with_labels(rows, form.label or "", path, labels[number])
        if name == "mmlu":
            rows = [Row({"subject": _subject(path)} | dict(row.values), row.file, row.number) for row in rows]
        if form.by_article:
            rows = _by_article(rows, path)
        lines += [_line(form, row) for row in rows]
    if not lines:
        raise UserError(f"--input {' '.join(inputs[:3])} has no rows")
    return lines


def _line(form: Format, row: Row) -> str:
    try:
        record = form.record(row.values)
        example_of(record, form_of(record), row.number)
    except (ValueError, KeyError, TypeError, SyntaxError, AttributeError, RecursionError) as error:
        raise UserError(f"--input {row.place}: {str(error).splitlines()[0]}") from None
    return json.dumps(record, ensure_ascii=False)


def _with_labels(rows: Sequence[Row], name: str, path: str, labels_path: str) -> list[Row]:
    labels = read_labels(labels_path)
    if len(labels) != len(rows):
        raise UserError(f"--labels {labels_path} has {len(labels)} labels, --input {path} {len(rows)} rows")
    return [Row({**row.values, name: label}, row.file, row.number) for row, label in zip(rows, labels, strict=True)]


def _by_article(rows: Sequence[Row], path: str) -> list[Row]:
    try:
        articles = prompts.race_articles([row.values for row in rows])
    except (ValueError, TypeError) as error:
        raise UserError(f"--input {path}: {str(error).splitlines()[0]}") from None
    return [Row(article, path, number) for number, article in enumerate(articles, start=1)]


def _subject(path: str) -> str:
    """MMLU's subject, from the name of its file: abstract_algebra_test.csv, or the folder of the hub's test-00000-of-00001.parquet."""
    stem = Path(path).stem
    if stem.startswith(("test-", "dev-", "validation-")):
        return Path(path).parent.name
    return stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
