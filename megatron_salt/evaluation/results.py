"""The results of evaluations on disk: JSON that a later start adds to, and a Markdown table. Standard library alone.

Each result is a mapping. Its `identity` holds all that decides the figures. A result is therefore found again by its identity, whatever
the paths, and is not computed twice.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.small_files import read_json

FORMAT = 1
Result = Mapping[str, Any]
"""{"load", "name", "identity": {...}, "examples", "metrics": {name: {"value", "stderr"}}, ...}"""


def read_results(path: Path, wanted: Sequence[Mapping[str, Any]], overwrite: bool) -> list[Result]:
    """The results in a file that belong to `wanted`, the identities of this evaluation; none where there is no file.

    Raises UserError where the file is none of ours, or has other results, which this evaluation would drop, unless `overwrite`.
    """
    if overwrite or not path.exists():
        return []
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it holds no results of this format")
        results = [one for one in content["results"] if one["identity"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output {path} exists and cannot be added to: {error}; --overwrite replaces it") from None
    if others := [one for one in results if one["identity"] not in wanted]:
        raise UserError(
            f"--output {path} has {len(others)} results that these flags do not ask for, the first of {others[0]['name']} and "
            f"{others[0]['load']}; give another --output, or replace it with --overwrite"
        )
    return results


def write_results(path: Path, results: Sequence[Result], metrics: Collection[str]) -> None:
    """Write PATH and, beside it, the same as a Markdown table. metrics: of tasks, those of the table. Raises OSError."""
    write_whole(path, (json.dumps({"format": FORMAT, "results": list(results)}, indent=2, ensure_ascii=False) + "\n").encode())
    write_whole(markdown_path(path), as_markdown(results, metrics).encode())


def markdown_path(path: Path) -> Path:
    """Where the table lies beside the JSON."""
    return path.with_suffix(".md") if path.suffix == ".json" else path.with_name(path.name + ".md")


def as_markdown(results: Sequence[Result], metrics: Collection[str]) -> str:
    """A table with a row for each task and metric, and a column for each checkpoint."""
    loads = list(dict.fromkeys(one["load"] for one in results))
    rows = list(
        dict.fromkeys(
            (one["name"], metric)
            for one in results
            for metric in one["metrics"]
            if metric in metrics or "data" in one["identity"]
        )
    )
    found = {(one["load"], one["name"]): one for one in results}
    lines = [
        _row("task", "metric", *(f"{load} (step {_step(results, load)})" for load in loads)),
        _row("---", "---", *["---:"] * len(loads)),
    ]
    for name, metric in rows:
        cells = [found[load, name]["metrics"].get(metric) if (load, name) in found else None for load in loads]
        lines.append(_row(name, metric, *map(_cell, cells)))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    error = estimate.get("stderr")
    return figure_text(estimate["value"]) + ("" if error is None else f" ± {figure_text(error)}")


def _step(results: Sequence[Result], load: str) -> int:
    return next(one["step"] for one in results if one["load"] == load)
