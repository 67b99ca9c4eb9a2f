"""Reading small files that describe large ones. A stranger may have written them.

A reader here takes only a regular file of a bounded size: it never waits for a FIFO or a device. JSON must be UTF-8 without a byte order
mark, with each key once, finite numbers, whole numbers within 64 bits, and limited nesting. Whatever is wrong is a ValueError that does
not name the file, since the caller knows what the file is for. An absent file stays an OSError.
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
"""Bytes: more than any tokenizer or list of checksums has, less than would harm a login node."""
_DEPTH = 64


def read_small(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file. Raises OSError where it cannot be read, ValueError where it is not regular or too large."""
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
    """The value in a JSON file. Raises OSError where it cannot be read, ValueError where it is not JSON as described above.

    nan: also accept Python's words for numbers that are not finite, which a measurement may be.
    """
    return parse_json(read_small(path), nan)


def parse_json(content: bytes, nan: bool = False) -> Any:
    """The value in JSON. Raises ValueError that says in one line what is wrong. nan: see `read_json`."""
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


def one_line(value: object, longest: int = 400) -> str:
    """The beginning of a value from a file, for a message in one line: quoted where it holds what cannot be printed."""
    text = str(value)[:longest]
    return text if text.isprintable() else repr(text)


def refuse_outside_names(names: Iterable[str]) -> None:
    """Raise ValueError where a name in a list of files points outside the directory of the list."""
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"it names the file {name!r}, which does not lie below its directory")


def _not_too_deep(tree: Any) -> Any:
    """`tree` itself. Raises ValueError where it is nested too deeply for code that walks it by recursion."""
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
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} is given twice")
        content[key] = value
    return content


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
