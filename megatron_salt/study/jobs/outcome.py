"""How the last start of a job ended: its outcome file, and why, from its log. Standard library alone.

A trainer writes its own line (train/launcher.py). For any other program, and for a trainer that died, whoever started it writes the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from megatron_salt.small_files import one_line, read_small
from megatron_salt.train.launcher import Word

_LINE = re.compile(r"(\w+) (\S+)(?: job \S+)? (.*)")  # examples/task.sh names no job
SEE_LOG = "see the log"  # the reason in an outcome that examples/task.sh wrote
_LARGEST = 1 << 16
_TAIL = 1 << 18  # bytes at the end of a log in which the reason is looked for
_RANK = re.compile(r"^\[rank\d+\]: ?")
_ERROR = re.compile(r"^(?:[\d-]+ [\d:]+ \| )?error: (.*)")
_EXCEPTION = re.compile(r"^(?!.*ChildFailedError)(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?::.*)?$")


@dataclass(frozen=True)
class Outcome:
    """What an outcome file says."""

    word: Word
    step: int | None
    """Last step done; None where the file names none"""
    reason: str
    """One line"""


def read_outcome(path: Path) -> Outcome | None:
    """The outcome in a file; None where there is none, or none that can be read."""
    try:
        line = read_small(path, _LARGEST).decode("utf-8").strip()
    except (OSError, ValueError):
        return None
    match = _LINE.fullmatch(line)
    if match is None or match[1] not in get_args(Word):
        return None
    word: Word = match[1]  # type: ignore[assignment]
    return Outcome(word, int(match[2]) if match[2].isdecimal() else None, one_line(match[3]))


def last_error(log: Path, since: int = 0) -> str | None:
    """The last error in a log after its first `since` bytes, in one line; its last line where no error is named; None: it is empty.

    An error is a line with "error: ", as our programs and launch.sh end, or else the last line of a traceback. Where launch.sh only says
    "see the log", the program's own error stands above it.
    """
    lines = [line for line in _tail(log, since) if line.strip()]
    refusals = [match[1] for line in lines if (match := _ERROR.match(line)) and not line.endswith(SEE_LOG)]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    found = (refusals or exceptions or lines)[-1:]
    return one_line(found[0].strip()) if found else None


def _tail(log: Path, since: int) -> list[str]:
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(since, size - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [_RANK.sub("", line) for line in text.splitlines()]
