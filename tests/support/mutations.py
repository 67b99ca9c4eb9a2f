"""Damage to a small file, drawn by hypothesis: something else in its place, bytes lost or changed, a value replaced."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 3, 0.5, -2.5, 1e308, float("nan"), float("inf"), 2**62, 2**63, -(2**63), 10**30, "", "x\ny",
                     "../x", "/etc/passwd", "float128", "é", [], [None], [[1]], {}, {"a": {}}]),
    st.integers(), st.floats(), st.text(max_size=8),
)  # fmt: skip
INSERTED = {
    "not UTF-8": b"\xff", "a byte order mark": b"\xef\xbb\xbf", "a zero byte": b"\0", "[": b"[", "}": b"}", "- ": b"- ", "NaN": b"NaN",
    "1e999": b"1e999", "30 digits": b"9" * 30, "a line's end": b"\n", "deep lists": b"[" * 100_000, "deep mappings": b'{"a":' * 500,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """`name` describes the damage; `apply` does it to a path."""

    name: str
    apply: Callable[[Path], None]

    def __repr__(self) -> str:
        return self.name


def mutations(structured: bool) -> st.SearchStrategy[Mutation]:
    """A strategy for mutations of a file. structured: also of values in its JSON."""
    drawn = [
        st.sampled_from(
            [Mutation(kind.__name__, kind) for kind in (gone, emptied, a_directory, a_fifo, a_device, a_broken_link)]
        ),
        st.builds(cut, share()),
        st.builds(flipped, share(), st.integers(0, 7)),
        st.builds(with_inserted, share(), st.sampled_from(list(INSERTED))),
    ]
    if structured:
        drawn += [st.builds(with_value, share(), VALUES)] * 4 + [
            st.builds(without, share()),
            st.builds(with_key_twice, share()),
        ]
    return st.one_of(*drawn)


def share() -> st.SearchStrategy[float]:
    return st.floats(0, 1, exclude_max=True)


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """Restore the file when the block ends."""
    content = path.read_bytes()
    try:
        yield
    finally:
        remove(path)
        path.write_bytes(content)


def copied(source: Path, target: Path) -> None:
    """Copy a folder. What is no regular file in it is made anew, not read."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_symlink():
            (target / path.name).symlink_to(os.readlink(path))
        elif path.is_dir():
            copied(path, target / path.name)
        elif path.is_fifo():
            os.mkfifo(target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def gone(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _of_bytes(name: str, change: Callable[[bytes], bytes]) -> Mutation:
    return Mutation(name, lambda path: _write(path, change(path.read_bytes())))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def cut(at: float) -> Mutation:
    return _of_bytes(f"cut at {at:.3f}", lambda content: content[: int(at * len(content))])


def flipped(at: float, bit: int) -> Mutation:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        if changed:
            changed[int(at * len(content))] ^= 1 << bit
        return bytes(changed)

    return _of_bytes(f"bit {bit} flipped at {at:.3f}", change)


def with_inserted(at: float, what: str) -> Mutation:
    def change(content: bytes) -> bytes:
        place = 0 if what.startswith("deep") else int(at * len(content))
        return content[:place] + INSERTED[what] + content[place:]

    return _of_bytes(f"{what} inserted at {at:.3f}", change)


def with_value(at: float, value: Any) -> Mutation:
    def change(tree: Any, path: tuple[Any, ...]) -> None:
        value_at(tree, path[:-1])[path[-1]] = value

    return _of_tree(f"value at {at:.3f} is {str(value)[:32]!r}", at, change)


def without(at: float) -> Mutation:
    return _of_tree(f"no value at {at:.3f}", at, lambda tree, path: value_at(tree, path[:-1]).pop(path[-1]))


def with_key_twice(at: float) -> Mutation:
    """The JSON text with one key and its value written twice."""

    def change(content: bytes) -> bytes:
        keys = [
            place for place in range(len(content)) if content.startswith(b'"', place) and b":" in content[place : place + 40]
        ]
        place = keys[int(at * len(keys))] if keys else 0
        end = content.find(b",", place) + 1
        return content[:end] + content[place:end] + content[end:]

    return _of_bytes(f"an entry twice at {at:.3f}", change)


def _of_tree(name: str, at: float, change: Callable[[Any, tuple[Any, ...]], Any]) -> Mutation:
    """A mutation of a JSON file, or of a file whose first line is JSON."""

    def apply(content: bytes) -> bytes:
        try:
            tree, rest = json.loads(content), b""
        except ValueError:
            first, _, rest = content.partition(b"\n")
            tree = json.loads(first)
        paths = list(paths_in(tree))
        if not paths:
            return b"3"
        changed = copy.deepcopy(tree)
        change(changed, paths[int(at * len(paths))])
        return json.dumps(changed).encode() + b"\n" + rest

    return _of_bytes(name, apply)


def paths_in(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys and indices to every value in a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*before, key)
        yield from paths_in(value, (*before, key))


def value_at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at the end of a path."""
    for key in path:
        tree = tree[key]
    return tree
