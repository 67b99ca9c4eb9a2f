"""Writes a study's report: report.html, report.md, runs.csv, evaluations.csv, and PNG pictures. All of them appear, or none."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_salt.errors import file_error
from megatron_salt.files import sole_writer, whole_files
from megatron_salt.study.report.content import Report, report_of
from megatron_salt.study.report.facts import StudyFacts
from megatron_salt.study.report.markdown import to_markdown
from megatron_salt.study.report.page import to_html
from megatron_salt.study.report.pictures import arms_with, by_figure, curve_file, draw_curves, draw_differences
from megatron_salt.study.report.selections import selection_section
from megatron_salt.study.report.tables import Cell, cell_text, evaluation_records, run_records
from megatron_salt.study.results import RunResult


def write_report(facts: StudyFacts, results: Sequence[RunResult], output_dir: Path) -> list[Path]:
    """Write the report of a study, also of one that is half done, over an earlier one. Returns the files, the page first.

    Without the package plotly there is no page, which is printed. Raises UserError for results that are no study's, and where files
    cannot be written.
    """
    report = report_of(facts, results, selection_section(results))
    texts = {
        "report.md": "",  # its pictures are known below
        "runs.csv": _csv(run_records(report.results, report.costs)),
        "evaluations.csv": _csv(evaluation_records(report.results)),
    }
    pictures = {curve_file(figure): figure for figure in report.figures if arms_with(report, figure)}
    differences = ["differences.png"] if by_figure(report.comparisons) else []
    texts["report.md"] = to_markdown(report, [*pictures, *differences])
    if importlib.util.find_spec("plotly") is not None:
        texts = {"report.html": to_html(report, facts.preparation_of)} | texts
    else:
        print(
            "report.html is not written, and an older one is out of date: it needs the package plotly; try: pip install plotly"
        )
    try:
        _write(report, texts, pictures, differences, output_dir)
    except OSError as error:
        name = "" if error.filename is None else f"{Path(error.filename).name}: "
        raise file_error(f"the report in {output_dir} cannot be written: {name}{error.strerror or error}", error) from error
    return [output_dir / name for name in (*texts, *pictures, *differences)]


def _write(
    report: Report, texts: Mapping[str, str], pictures: Mapping[str, str], differences: Sequence[str], output_dir: Path
) -> None:
    """Write all files. Raises OSError."""
    output_dir.mkdir(parents=True, exist_ok=True)
    names = [*texts, *pictures, *differences]
    with sole_writer("the report of", output_dir / "report"), whole_files([output_dir / name for name in names]) as files:
        temporary = dict(zip(names, files, strict=True))
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8")
        for name, figure in pictures.items():
            draw_curves(report, figure, temporary[name])
        for name in differences:
            draw_differences(report.comparisons, temporary[name])


def _csv(records: Sequence[Mapping[str, Cell]]) -> str:
    """A CSV file with a column for every key, in the order in which they come."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell_text(record.get(column)) for column in columns] for record in records)
    return text.getvalue()
