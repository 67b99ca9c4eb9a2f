"""Reading a teacher-score index (`score_format.py`), and merging its shards into one.

An index may be in one directory, or in several with the same manifest. It opens only where its shards are finished and cover every
sample once. Opening reads a few small files a shard, whatever the number of samples. Columns are read, not mapped: so a program that
streams over 10^9 scores takes no more memory than a chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.data.duplicate_inputs import WAY_OUT, refuse_repeated_directories
from megatron_salt.data.json_records import read_record
from megatron_salt.data.manifest import content_hash
from megatron_salt.errors import UserError
from megatron_salt.files import reading
from megatron_salt.selection.score_format import (
    FORMAT,
    INDEX,
    SHARD,
    IndexManifest,
    column_path,
    columns,
    npy_header,
    read_index,
    shard_paths,
    write_index_manifest,
    write_shard_manifest,
)  # fmt: skip

CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A finished shard: samples [first, end)."""

    path: Path
    first: int
    end: int
    hashes: dict[str, str]
    """blake2b-256 of each column's file, hexadecimal."""


@dataclass(frozen=True)
class ScoreIndex:
    """The scores of all samples."""

    manifest: IndexManifest
    shards: tuple[Shard, ...]
    """In the order of samples. Each begins where the one before ends."""
    flag_name: str
    """The flag that named the index, for error messages."""

    @classmethod
    def open(cls, directories: Sequence[str], flag_name: str = "--scores", allow_duplicates: bool = False) -> ScoreIndex:
        """Open the shards in these directories. UserError where they are not, together, one whole index. allow_duplicates: equal shards
        are allowed, and one of them is read."""
        if not directories:
            raise UserError(f"{flag_name} is missing: it takes the directory of a score index, or several with its shards")
        if not allow_duplicates:
            refuse_repeated_directories(flag_name, directories)
        manifest = read_index(Path(directories[0]), flag_name)
        for other in directories[1:]:
            differences = read_index(Path(other), flag_name).differences(manifest)
            if differences:
                raise UserError(
                    f"{flag_name} {other} (there) is an index of other scores than {directories[0]} (here): "
                    f"{'; '.join(differences)}"
                )
        paths = [shard for directory in directories for shard in shard_paths(Path(directory))]
        shards = tuple(
            sorted((_open_shard(path, first, end, manifest, flag_name) for first, end, path in paths), key=lambda s: s.first)
        )
        shards = _each_once(shards, flag_name, allow_duplicates)
        _refuse_gaps(shards, manifest, flag_name)
        return cls(manifest, shards, flag_name)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def columns(self) -> dict[str, np.dtype]:
        """The type of every column, by name."""
        return columns(self.manifest.top_k, self.manifest.seq_length)

    def dtype(self, column: str) -> np.dtype:
        """Type of a column. UserError where there is no such column."""
        if column not in self.columns:
            raise UserError(f"{self.flag_name} has no column {column}; its columns are {', '.join(self.columns)}")
        return self.columns[column]

    def read(self, column: str, first: int, end: int) -> np.ndarray:
        """Values of samples [first, end) -> [end - first], of the column's type."""
        dtype = self.dtype(column)
        assert 0 <= first <= end <= self.num_samples, (first, end, self.num_samples)
        values = np.empty(end - first, dtype)
        start = first
        for shard in self.shards[bisect_right(self.shards, first, key=lambda shard: shard.first) - 1 :]:
            if start == end:
                break
            stop = min(end, shard.end)
            offset = len(npy_header(dtype, shard.end - shard.first)) + (start - shard.first) * dtype.itemsize
            _read_into(values[start - first : stop - first], column_path(shard.path, column), offset)
            start = stop
        return values

    def chunks(
        self, column: str, first: int = 0, end: int | None = None, size: int = CHUNK
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(id of the first value, values) of samples [first, end), at most `size` at a time, in the order of ids."""
        stop = self.num_samples if end is None else end
        self.dtype(column)
        return ((start, self.read(column, start, min(start + size, stop))) for start in range(first, stop, size))

    def rows(self, ids: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Values of any samples, int [n] in any order -> each column [n].

        Samples of one chunk of ids are read together, with what lies between them."""
        ids = np.asarray(ids, np.int64)
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        cuts = [0, *(np.flatnonzero(np.diff(ordered // CHUNK)) + 1).tolist(), len(ids)]
        rows = {name: np.empty(len(ids), self.dtype(name)) for name in names}
        for left, right in itertools.pairwise(cuts):
            if left < right:
                first, end = int(ordered[left]), int(ordered[right - 1]) + 1
                for name, values in rows.items():
                    values[order[left:right]] = self.read(name, first, end)[ordered[left:right] - first]
        return rows

    def verify(self, column: str) -> None:
        """Read a whole column. UserError, naming the file, where its hash is not the recorded one."""
        self.dtype(column)
        for shard in self.shards:
            path = column_path(shard.path, column)
            with reading(path, f"{self.flag_name}: "), open(path, "rb") as stream:
                actual = hashlib.file_digest(stream, content_hash).hexdigest()
            if actual != shard.hashes[column]:
                raise UserError(
                    f"{self.flag_name}: {path} has content hash {actual}, {shard.path / SHARD} says {shard.hashes[column]}; "
                    f"delete {shard.path} and score its samples again"
                )


def merge(index: ScoreIndex, output: Path) -> None:
    """Make `output` an index of one shard, byte for byte what a single job would have written. In constant memory.

    `output` appears whole or not at all. An index that was there before is moved to `output`.old, and deleted at the end; a kill may
    leave it there.
    """
    temporary, old = output.with_name(output.name + ".tmp"), output.with_name(output.name + ".old")
    if os.path.lexists(temporary):
        _delete(temporary)  # left by a merge that was killed
    if os.path.lexists(old):
        if not output.exists():
            raise UserError(
                f"--output {output}: a merge was killed before it could replace it; the index that was there is {old}: move it "
                "back, or away"
            )
        _delete(old)
    shard = temporary / f"samples-{0:015d}-{index.num_samples:015d}"
    shard.mkdir(parents=True)
    try:
        hashes = {name: _merge_column(index, name, column_path(shard, name)) for name in index.columns}
        write_shard_manifest(shard, index.manifest, 0, index.num_samples, hashes)
        write_index_manifest(index.manifest, temporary / INDEX)
        if os.path.lexists(output):
            os.rename(output, old)
        os.rename(temporary, output)
        if os.path.lexists(old):
            _delete(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(output):
            os.rename(old, output)
        raise


def _delete(path: Path) -> None:
    """Delete a directory. Of a link, delete the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _merge_column(index: ScoreIndex, name: str, path: Path) -> str:
    """Write a column's file and return its hash. Raises UserError where a shard's column has not its recorded hash."""
    digest = content_hash()
    index.verify(name)
    with open(path, "wb") as stream:
        pieces = (values.tobytes() for _, values in index.chunks(name))
        for piece in itertools.chain([npy_header(index.dtype(name), index.num_samples)], pieces):
            stream.write(piece)
            digest.update(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _open_shard(path: Path, first: int, end: int, manifest: IndexManifest, flag_name: str) -> Shard:
    """A shard of the index of `manifest`. UserError where it is unfinished, of another index, or a column has another size."""
    try:
        _, raw = read_record(path / SHARD, (FORMAT,), "delete the shard and score its samples again")
    except FileNotFoundError:
        raise UserError(
            f"{flag_name}: {path} is not finished: run its scoring job again, which goes on where it stopped "
            "(or delete it, if it is of a division that was given up)"
        ) from None
    try:
        index, bounds, files = raw["index"], (raw["first"], raw["end"]), raw["columns"]
        facts = {name: (files[name]["bytes"], files[name]["hash"]) for name in columns(manifest.top_k, manifest.seq_length)}
        if not all(type(size) is int and isinstance(digest, str) for size, digest in facts.values()):
            raise TypeError("sizes are whole numbers, hashes words")
        if not all(type(bound) is int for bound in bounds):
            raise TypeError("first and end are whole numbers")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / SHARD} cannot be read ({error!r}); delete the shard and score its samples again") from None
    if index != manifest.fingerprint or bounds != (first, end) or not 0 <= first < end <= manifest.num_samples:
        raise UserError(
            f"{flag_name}: {path} is a shard of another index: it has samples {bounds[0]} to {bounds[1]} of {index}, "
            f"its directory {manifest.num_samples} samples of {manifest.fingerprint}"
        )
    for name, (size, _) in facts.items():
        file = column_path(path, name)
        actual = file.stat().st_size if file.exists() else 0
        if actual != size:
            how = "truncated" if actual < size else "longer than it was"
            raise UserError(
                f"{flag_name}: {file} is {how}: it has {actual} bytes, {path / SHARD} says {size}; "
                f"delete {path} and score its samples again"
            )
    return Shard(path, first, end, {name: digest for name, (_, digest) in facts.items()})


def _each_once(shards: Sequence[Shard], flag_name: str, allow_duplicates: bool) -> tuple[Shard, ...]:
    """The shards, ascending, without those that repeat the samples and the bytes of the one before. UserError unless these are allowed."""
    kept: list[Shard] = []
    for shard in shards:
        if not kept or (shard.first, shard.end, shard.hashes) != (kept[-1].first, kept[-1].end, kept[-1].hashes):
            kept.append(shard)
        elif not allow_duplicates:
            raise UserError(
                f"{flag_name} names {kept[-1].path} and {shard.path}, which hold the same scores of samples {shard.first} to "
                f"{shard.end - 1}; {WAY_OUT}"
            )
    return tuple(kept)


def _refuse_gaps(shards: Sequence[Shard], manifest: IndexManifest, flag_name: str) -> None:
    """Raise UserError unless the shards, ascending, cover each sample once."""
    missing, covered = [], 0
    for one, other in itertools.pairwise(shards):
        if other.first < one.end:
            raise UserError(f"{flag_name}: {one.path} and {other.path} overlap; leave one of them out")
    for shard in shards:
        if covered < shard.first:
            missing.append((covered, shard.first))
        covered = shard.end
    if covered < manifest.num_samples:
        missing.append((covered, manifest.num_samples))
    if missing:
        ranges = ", ".join(f"{first} to {end - 1}" for first, end in missing[:8]) + (", ..." if len(missing) > 8 else "")
        count = sum(end - first for first, end in missing)
        raise UserError(
            f"{flag_name}: {count} of {manifest.num_samples} samples are not scored: {ranges}; run the jobs of all shards, "
            "or name every directory that holds some"
        )


def _read_into(values: np.ndarray, path: Path, offset: int) -> None:
    """Fill contiguous `values` from a file's bytes. UserError where the file has become too short."""
    with reading(path), open(path, "rb", buffering=0) as stream:
        stream.seek(offset)
        rest = values.data.cast("B")
        while rest.nbytes:
            done = stream.readinto(rest)
            if not done:
                raise UserError(f"{path} ends at byte {stream.tell()}; it was longer when it was opened")
            rest = rest[done:]
