"""A file of records that survives a kill at any byte: records are read back whole, and a torn last one is dropped.

A record is a line: a hash, and JSON. `append` returns when the record is on disk, so the data that it describes must be on disk before.
One process at a time holds a journal. Standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.files import try_lock
from megatron_salt.small_files import parse_json


class Journal:
    """The journal at `path`; the file is made if missing."""

    def __init__(self, path: Path) -> None:
        """UserError while another process holds it, and where `path` is not a regular file."""
        self.path = path
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise UserError(f"{path} is not a regular file; remove it, or give another --output-prefix")
        self._stream = open(path, "a+b")  # noqa: SIM115 (closed by close)
        if not try_lock(self._stream.fileno()):
            self._stream.close()
            raise UserError(f"{path} is held by another process, which writes the same output")
        self.records: list[dict[str, Any]] = []
        """All records, the oldest first."""
        whole = 0
        self._stream.seek(0)
        for line in self._stream:
            digest, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or digest != _digest(body):
                break
            try:
                record = parse_json(body)
            except ValueError:
                break
            if not isinstance(record, dict):
                break
            self.records.append(record)
            whole += len(line)
        self._stream.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; on disk when this returns."""
        body = json.dumps(record).encode()
        self._stream.write(_digest(body) + b" " + body + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.records.append(dict(record))

    def clear(self) -> None:
        """Forget all records."""
        self._stream.truncate(0)
        self.records.clear()

    def close(self) -> None:
        self._stream.close()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()
