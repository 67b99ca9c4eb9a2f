"""Whether a checkpoint's files are what was written: sizes and checksums.

`checksums.json` lists every file of a checkpoint with its size and SHA-256 (hashlib's fastest strong hash where the CPU has SHA
instructions), and holds a hash of the list itself. Checksums find damage, not malice: see safe_unpickle.py for that. Standard library only;
no function here communicates.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.small_files import one_line, read_json, refuse_outside_names

CHECKSUMS = "checksums.json"
METADATA = ".metadata"
"""torch_dist's table of contents: which tensor lies where."""


class DamagedCheckpoint(UserError):
    """Files are missing, truncated or altered; the message names each with both checksums."""


@dataclass(frozen=True)
class FileSum:
    """What a file should be."""

    size: int
    """Bytes."""
    sha256: str

    def __str__(self) -> str:
        return f"sha256 {self.sha256[:16]}..., {self.size} bytes"


def sum_of_file(path: Path) -> FileSum:
    """Size and hash of a file's present contents, read as a stream."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSum(file.tell(), digest)


def write_summed(path: Path, content: bytes) -> FileSum:
    """Write a file durably, so that it appears whole or not at all, and return its sum. Raises OSError."""
    write_whole(path, content, durable=True)
    return FileSum(len(content), hashlib.sha256(content).hexdigest())


def write_checksums(directory: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the list of a checkpoint's files, durably; names are relative to `directory`. Raises OSError."""
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    content = json.dumps({"files": files, "sha256_of_files": _hash_of(files)}, indent=1).encode()
    write_whole(directory / CHECKSUMS, content, durable=True)


def read_checksums(directory: Path, required: Iterable[str] = (METADATA,)) -> dict[str, FileSum]:
    """What `write_checksums` wrote. Raises DamagedCheckpoint where it is missing, altered or lacks a `required` name."""
    path = directory / CHECKSUMS
    try:
        content = read_json(path)
        stated, actual = content["sha256_of_files"], _hash_of(content["files"])
        if stated != actual:
            raise DamagedCheckpoint(
                f"{path}: was altered: its list hashes to sha256 {actual[:16]}..., not {one_line(stated, 16)}..."
            )
        sums = {name: _file_sum(entry) for name, entry in content["files"].items()}
        refuse_outside_names(sums)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: is missing, so this is no whole checkpoint of megatron_salt") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from None
    missing = sorted(set(required) - sums.keys())
    if missing:
        raise DamagedCheckpoint(f"{path}: does not list {', '.join(missing)}")
    return sums


def damaged_files(directory: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """One line for each file that is not as `sums` says, naming the file and both sums; empty when all is well."""
    problems = []
    for name, expected in sums.items():
        path = directory / name
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode):
                problems.append(f"{path}: is not a regular file; expected {expected}")
                continue
            size = state.st_size
            found = sum_of_file(path) if size == expected.size else None
        except OSError as error:
            problems.append(f"{path}: {error.strerror}; expected {expected}")
            continue
        if found is None:
            problems.append(f"{path}: has {size} bytes; expected {expected}")
        elif found != expected:
            problems.append(f"{path}: has {found}; expected {expected}")
    return problems


def _file_sum(entry: Mapping[str, Any]) -> FileSum:
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError(f"a file of {size!r} bytes with sha256 {digest!r}")
    return FileSum(size, digest)


def _hash_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
