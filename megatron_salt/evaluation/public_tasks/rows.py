"""Rows of a public data set from the files in which it is distributed: JSON, JSON lines, CSV, parquet, text.

The name says how a file is read: .parquet; .csv and .tsv; .json (an array of objects, or one object); .txt (a text a line, or one JSON
object where the data set is distributed so); everything else is JSON lines.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.small_files import one_line, parse_json, read_small


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    values: Mapping[str, Any]
    file: str
    number: int
    """Line of the file, or number of the row, from 1."""

    @property
    def place(self) -> str:
        return f"{self.file}, {'row' if self.file.lower().endswith(('.parquet', '.json')) else 'line'} {self.number}"


def read_rows(path: str, columns: Sequence[str] = (), text_is_json: bool = False) -> list[Row]:
    """All rows of a file. columns: of a .csv or .tsv without a header. text_is_json: a .txt holds one JSON object.

    Raises UserError, which names the file and the line.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".gz", ".zst") or path == "-":
        raise UserError(f"--input {path}: a plain file is read here; decompress it first")
    if suffix == ".parquet":
        return [Row(values, path, number) for number, values in enumerate(_parquet(path), start=1)]
    content = _read(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, _text(path, content), columns, "," if suffix == ".csv" else "\t")
    if suffix == ".json" or (suffix == ".txt" and text_is_json):
        found = _parse(content, path, None)
        objects = found if isinstance(found, list) else [found]
        return [_row(values, path, number) for number, values in enumerate(objects, start=1)]
    if suffix == ".txt":
        lines = _text(path, content).split("\n")
        return [Row({"text": line}, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    lines_of_bytes = content.split(b"\n")
    return [_row(_parse(line, path, n), path, n) for n, line in enumerate(lines_of_bytes, start=1) if line.strip()]


def read_labels(path: str) -> list[str]:
    """The labels of a file with one a line. Raises UserError."""
    content = _text(path, _read(path, "--labels"), "--labels")
    return [line.strip() for line in content.splitlines() if line.strip()]


def _read(path: str, flag_name: str = "--input") -> bytes:
    try:
        return read_small(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag_name} {path} cannot be read: {reason}") from None


def _text(path: str, content: bytes, flag_name: str = "--input") -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag_name} {path}: byte {error.start} is not UTF-8") from None


def _parse(content: bytes, path: str, line: int | None) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        place = path if line is None else f"{path}, line {line}"
        raise UserError(f"--input {place} is not JSON: {str(error).splitlines()[0]}") from None


def _row(values: Any, path: str, number: int) -> Row:
    row = Row(values, path, number)
    if not isinstance(values, dict):
        raise UserError(f"--input {row.place} is not a JSON object")
    return row


def _csv(path: str, text: str, columns: Sequence[str], delimiter: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[Row] = []
    names = list(columns)
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
                continue
            if not rows and columns and _is_header(cells, columns):
                raise UserError(
                    f"--input {path}, line {reader.line_num} is a header ({one_line(', '.join(cells), 80)}); this data set is distributed "
                    f"without one: delete the line, and keep the columns {', '.join(columns)}"
                )
            if len(cells) != len(names):
                raise UserError(
                    f"--input {path}, line {reader.line_num} has {len(cells)} cells, not the {len(names)} of {', '.join(names)}"
                )
            rows.append(Row(dict(zip(names, cells, strict=True)), path, reader.line_num))
    except csv.Error as error:
        raise UserError(f"--input {path}, line {reader.line_num}: {error}") from None
    return rows


def _is_header(cells: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether cells name the first and the last of the columns, in any order, as no row does."""
    return {columns[0].casefold(), columns[-1].casefold()} <= {cell.strip().casefold() for cell in cells}


def _parquet(path: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"--input {path}: reading .parquet takes pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--input {path} cannot be read: {str(error).splitlines()[0]}") from None
