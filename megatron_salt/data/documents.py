"""Raw text in: input files, their lines, and the texts on a line of JSON.

Files come in the order in which they were named, a pattern's matches sorted. Lines are read as bytes and end at a line feed
alone; .gz is decompressed on the way. Whatever is wrong with a line is said in words (BadLine), whatever is wrong with a file
is a UserError. Standard library alone.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_salt.errors import UserError

_UNREADABLE = (".zst", ".parquet", ".bz2", ".xz", ".zip")
_SHOWN = 10


class BadLine(ValueError):
    """Why a line gives no document."""


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of one file."""

    file: str
    first_line: int
    """Number of the first line, from 1."""
    lines: list[bytes]


class BadLines:
    """Counts bad lines, shows the first few on the way and ends the run above --max-bad-lines."""

    def __init__(self, allowed: int) -> None:
        self.count = 0
        self._allowed = allowed
        self._first: list[str] = []

    def add(self, file: str, found: Sequence[tuple[int, str]]) -> None:
        """`found`: (line number, reason). UserError once there are more than allowed."""
        for number, reason in found:
            self.count += 1
            if len(self._first) < _SHOWN:
                self._first.append(f"{file}:{number}: {reason}")
                print(f"bad line {self._first[-1]}", flush=True)
        if self.count > self._allowed:
            raise UserError(f"--input has {self.count} bad lines so far, --max-bad-lines allows {self._allowed}; "
                            f"nothing was written. First: {self._first[0]}")


def input_files(patterns: Sequence[str]) -> list[str]:
    """The files that --input names. UserError for one that is missing, named twice, or of a form that cannot be read."""
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input {pattern}: no such file")
        found.extend(path for path in matches if len(matches) == 1 or not os.path.isdir(path))
    for path in found:
        if os.path.isdir(path):
            raise UserError(f"--input {path} is a directory; name files, such as '{os.path.join(path, '*.jsonl')}'")
        if path.endswith(_UNREADABLE):
            raise UserError(f"--input {path}: {os.path.splitext(path)[1]} files cannot be read; give plain or .gz files")
        if found.count(path) > 1:
            raise UserError(f"--input names {path} {found.count(path)} times")
    if not found:
        raise UserError("--input names no file")
    return found


def line_batches(path: str, batch_bytes: int) -> Iterator[LineBatch]:
    """The lines of a file in batches of about `batch_bytes` (a longer line is a batch). UserError when it cannot be read."""
    number = 1
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as stream:
            while lines := stream.readlines(batch_bytes):
                if number == 1:
                    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # byte order mark
                yield LineBatch(path, number, lines)
                number += len(lines)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--input {path} is damaged or truncated after line {number - 1}: {error}") from None
    except OSError as error:
        raise UserError(f"--input {path} cannot be read after line {number - 1}: {error.strerror}") from None


def decode_line(line: bytes) -> str:
    """A line as text, line feed kept. BadLine unless it is UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start}") from None


def json_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The strings under `keys` of a JSON object. BadLine when anything about it is not so."""
    text = decode_line(line)
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"malformed JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(f"malformed JSON: {error}") from None
    if not isinstance(entry, dict):
        raise BadLine(f"not a JSON object but {type(entry).__name__}")
    for key in keys:
        if key not in entry:
            raise BadLine(f"no key {key!r}")
        if not isinstance(entry[key], str):
            raise BadLine(f"the value of {key!r} is not a string but {type(entry[key]).__name__}")
        if not entry[key].isascii():
            _refuse_lone_surrogates(key, entry[key])
    return [entry[key] for key in keys]


def _refuse_lone_surrogates(key: str, text: str) -> None:
    """JSON can spell half a character (\\ud800), which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"the value of {key!r} has a lone surrogate at character {error.start}") from None
