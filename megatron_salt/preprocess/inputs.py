"""The files that --input names, and the texts on a line of JSON.

Files come in the order in which they were named; the matches of a pattern are sorted. A bad line is a BadLine with the reason, a bad
file is a UserError. `readers.py` reads the files. Pure.
"""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Sequence

from megatron_salt.data.duplicate_inputs import refuse_repeated_files
from megatron_salt.errors import UserError
from megatron_salt.files import real_path

STDIN = "-"
_UNREADABLE = (".bz2", ".xz", ".zip", ".lz4", ".7z")
_SHOWN = 10


class BadLine(ValueError):
    """Why a line gives no document."""

    def __init__(self, kind: str, details: str) -> None:
        """kind: the reason in two or three words; bad lines are counted by kind."""
        super().__init__(details)
        self.kind = kind


class BadLines:
    """Counts bad lines, prints the first few and ends the run above --max-bad-lines."""

    def __init__(self, allowed: int, count: int = 0) -> None:
        """count: bad lines of an earlier run that this one resumes."""
        self.count = count
        self._allowed = allowed
        self._first: list[str] = []

    def add(self, file: str, lines: Sequence[tuple[int, str]]) -> None:
        """lines: (line number, reason). UserError once there are more than allowed."""
        for number, reason in lines:
            self.count += 1
            if len(self._first) < _SHOWN:
                self._first.append(f"{file}:{number}: {reason}")
                print(f"bad line {self._first[-1]}", flush=True)
        if self.count > self._allowed:
            raise UserError(
                f"--input has {self.count} bad lines so far, --max-bad-lines allows {self._allowed}; "
                f"nothing was published. First: {(self._first or ['in an earlier run'])[0]}"
            )


def input_files(patterns: Sequence[str], allow_duplicates: bool, file_is_document: bool = False) -> list[str]:
    """The files that --input names. UserError for one that is missing, named twice, or of a form that cannot be read.

    file_is_document: a plain text file is one document; two such files may be equal.
    """
    files: list[str] = []
    if STDIN in patterns and len(patterns) > 1:
        raise UserError(f"--input {' '.join(patterns)}: {STDIN}, standard input, comes alone")
    if STDIN in patterns:
        return [STDIN]
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input {pattern}: no such file")
        files.extend(path for path in matches if len(matches) == 1 or not os.path.isdir(path))
    for path in files:
        if not os.path.exists(path):
            raise UserError(f"--input {path} is a link to {real_path(path)}, which does not exist")
        if not os.access(path, os.R_OK):
            raise UserError(f"--input {path} cannot be read: {os.strerror(errno.EACCES)}")
        if os.path.isdir(path):
            raise UserError(f"--input {path} is a directory; name files, such as '{os.path.join(path, '*.jsonl')}'")
        if path.lower().endswith(_UNREADABLE):
            raise UserError(
                f"--input {path}: {os.path.splitext(path)[1]} files cannot be read; give plain, .gz, .zst or "
                ".parquet files, or pipe the text into --input -"
            )
    if not files:
        raise UserError("--input names no file")
    if not allow_duplicates:
        refuse_repeated_files("--input", files, lambda path: not file_is_document)
    return files


def refuse_encoding(path: str, beginning: bytes, by_lines: bool) -> None:
    """UserError where the `beginning` of a file shows another encoding, or line ends of old Macs. by_lines: a document is a line."""
    for name, mark in (
        ("UTF-32", b"\xff\xfe\0\0"),
        ("UTF-32", b"\0\0\xfe\xff"),
        ("UTF-16", b"\xff\xfe"),
        ("UTF-16", b"\xfe\xff"),
    ):
        if beginning.startswith(mark):
            raise UserError(f"--input {path} is {name}; convert it with iconv -f {name} -t UTF-8")
    if by_lines and b"\n" not in beginning and b"\r" in beginning.strip():
        raise UserError(f"--input {path} ends its lines with carriage returns alone; convert it with tr '\\r' '\\n'")


def decode_line(line: bytes) -> str:
    """A line as text; its line feed stays. BadLine unless it is UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine("invalid UTF-8", f"invalid UTF-8 at byte {error.start}") from None


def json_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The strings under `keys` of a JSON object. BadLine for anything else."""
    text = decode_line(line)
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine("malformed JSON", f"malformed JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise BadLine("malformed JSON", f"malformed JSON: {error}") from None
    if not isinstance(entry, dict):
        raise BadLine("not an object", f"not a JSON object but {type(entry).__name__}")
    for key in keys:
        if key not in entry:
            raise BadLine("no key", f"no key {key!r}")
        if not isinstance(entry[key], str):
            raise BadLine("not a string", f"the value of {key!r} is not a string but {type(entry[key]).__name__}")
        if not entry[key].isascii():
            refuse_lone_surrogates(key, entry[key])
    return [entry[key] for key in keys]


def refuse_lone_surrogates(key: str, text: str) -> None:
    """BadLine for half a character: JSON can spell one (\\ud800), but no tokenizer can encode it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine("lone surrogate", f"the value of {key!r} has a lone surrogate at character {error.start}") from None
