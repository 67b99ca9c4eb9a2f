"""Small files that describe large ones, read as if a stranger had written them.

A reader here takes a regular file of a bounded size and nothing else: it never waits for a FIFO or a device. JSON is UTF-8 without a BOM,
each key once, every number finite and every whole number within 64 bits, nested no deeper than any of ours. What is wrong
is a ValueError that does not name the file, for the caller knows what the file is for; an absent file stays an OSError.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

LARGEST = 256 << 20
"""Bytes: above a tokenizer's or a list of checksums, below what hurts a login node."""
_DEPTH = 64


def read_small(path: Path, largest: int = LARGEST) -> bytes:
    """All of a regular file. OSError where it cannot be read, ValueError where it is no file of this kind."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is not a regular file")
        if state.st_size > largest:
            raise ValueError(f"it has {state.st_size} bytes, more than the {largest} that are read of such a file")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(state.st_size)
    finally:
        os.close(descriptor)


def read_json(path: Path, nan: bool = False) -> Any:
    """What the file holds. OSError where it cannot be read, ValueError where it is not JSON of our kind.

    `nan` also takes Python's words for numbers that are not finite, which measurements may be.
    """
    return parse_json(read_small(path), nan)


def parse_json(content: bytes, nan: bool = False) -> Any:
    """What `content` holds. Raises ValueError that says what is wrong, in one line."""
    if not content.strip():
        raise ValueError("it is empty")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    try:
        return _not_too_deep(
            json.loads(
                text,
                object_pairs_hook=_each_key_once,
                parse_constant=float if nan else _no_constant,
                parse_float=_float,
                parse_int=_int,
            )
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEPTH} levels") from None


def refuse_outside_names(names: Iterable[str]) -> None:
    """ValueError unless each name is that of a file below the directory it is listed for."""
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"it names the file {name!r}, which does not lie below its directory")


def _not_too_deep(tree: Any) -> Any:
    """`tree` itself; ValueError where it is too deep for whoever walks it later."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise ValueError(f"it is nested deeper than {_DEPTH} levels")
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    return tree


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _float(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"the number {word[:24]} is too large")
    return number


def _int(word: str) -> int:
    if len(word) > 20 or not -(2**63) <= int(word) < 2**64:
        raise ValueError(f"the number {word[:24]} is too large")
    return int(word)
