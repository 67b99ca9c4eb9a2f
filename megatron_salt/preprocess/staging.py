"""Datasets that are being written: files under temporary names, counts of their contents, and the journal by which a run resumes.

Encoded chunks come in order. Every JOURNAL_SECONDS the files are brought to the disk; then the journal records how far they and the input
are. After a kill at any byte the next run cuts the files back to the last record, checks their hashes and goes on there: nothing comes
twice, nothing is lost. Publishing moves all files to their final names. The record before it makes a kill in the middle harmless.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.data.manifest import manifest_path, tokenizer_directory
from megatron_salt.errors import UserError
from megatron_salt.preprocess.encode import EncodedChunk
from megatron_salt.preprocess.indexed_writer import IndexedWriter, Mark
from megatron_salt.preprocess.journal import Journal

JOURNAL_SECONDS = 10.0


@dataclass(kw_only=True)
class Tally:
    """Counts of one input file. A list has one entry per key."""

    lines: int
    """Lines or rows, blank ones included."""
    documents: int
    """Lines that are not blank."""
    rejected: dict[str, int]
    """Kind of reason -> number of lines."""
    written: list[int]
    empty: list[int]
    text_bytes: list[int]
    special_documents: list[int]
    """Documents whose text has special tokens."""
    special_tokens: list[dict[str, int]]
    """Token -> occurrences in texts."""

    @classmethod
    def empty_of(cls, num_keys: int) -> Tally:
        """Nothing counted yet."""
        return cls(
            lines=0,
            documents=0,
            rejected={},
            written=[0] * num_keys,
            empty=[0] * num_keys,
            text_bytes=[0] * num_keys,
            special_documents=[0] * num_keys,
            special_tokens=[{} for _ in range(num_keys)],
        )


class StagingArea:
    """Writers of one dataset per key, at `prefixes` + `.tmp`, with counts of the input `files` and a journal."""

    def __init__(
        self, journal: Journal, prefixes: Sequence[str], files: Sequence[str], dtype: np.dtype, digests: bool, backend: str
    ) -> None:
        """Go on from the last record of the journal, or begin. UserError when the files of the earlier run have changed."""
        self.journal, self.prefixes, self.files = journal, prefixes, files
        self.tallies = [Tally.empty_of(len(prefixes)) for _ in files]
        self.file, self.position, self.on_disk = 0, 0, 0
        """Where the input goes on: number of the file, position in it, bytes of it on disk before that."""
        self.backends = {backend}
        """Backends that encoded, in this run and in the runs that it resumes."""
        marks: list[Mark | None] = [None] * len(prefixes)
        try:
            for record in journal.records:
                if "marks" in record:
                    marks = [Mark(mark["documents"], mark["tokens"], tuple(mark["hashes"])) for mark in record["marks"]]
                    self.file, self.position, self.on_disk = record["file"], record["position"], record["on_disk"]
                    self.backends |= set(record["backends"])
                    for number, tally in record["tallies"].items():
                        self.tallies[int(number)] = Tally(**tally)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{journal.path} is not a journal of this release ({error!r}); --overwrite begins anew") from None
        self._touched: set[int] = set()
        self._noted = time.monotonic()
        self.writers = []
        try:
            for prefix, mark in zip(prefixes, marks, strict=True):
                self.writers.append(IndexedWriter(temporary(prefix), dtype, mark, digests))
        except BaseException:
            self.close()
            raise

    @property
    def bad_lines(self) -> int:
        return sum(sum(tally.rejected.values()) for tally in self.tallies)

    def add(self, encoded: EncodedChunk) -> None:
        """Append a chunk to the datasets."""
        chunk = encoded.chunk
        tally = self.tallies[chunk.file]
        tally.lines += encoded.lines
        tally.documents += encoded.documents
        tally.rejected = dict(Counter(tally.rejected) + Counter(kind for _, kind, _ in encoded.bad))
        for i, writer in enumerate(self.writers):
            writer.append(encoded.ids[i], encoded.lengths[i], encoded.digests[i] if encoded.digests else None)
            tally.written[i] += len(encoded.lengths[i])
            tally.empty[i] += encoded.empty[i]
            tally.text_bytes[i] += encoded.text_bytes[i]
            tally.special_documents[i] += encoded.special[i].documents
            tally.special_tokens[i] = dict(Counter(tally.special_tokens[i]) + Counter(encoded.special[i].tokens))
        self.file, self.position, self.on_disk = chunk.file, chunk.end, chunk.on_disk
        self._touched.add(chunk.file)
        if time.monotonic() - self._noted >= JOURNAL_SECONDS:
            self.note()

    def note(self) -> None:
        """Bring everything to the disk, then record in the journal how far it is."""
        marks = [asdict(writer.mark()) for writer in self.writers]
        self.journal.append(
            {
                "file": self.file,
                "position": self.position,
                "on_disk": self.on_disk,
                "marks": marks,
                "backends": sorted(self.backends),
                "tallies": {str(number): asdict(self.tallies[number]) for number in sorted(self._touched)},
            }
        )
        self._touched.clear()
        self._noted = time.monotonic()

    def close(self) -> None:
        """Close the files, and leave them to a later run."""
        for writer in self.writers:
            writer.close()


def temporary(prefix: str) -> str:
    return prefix + ".tmp"


def journal_path(output_prefix: str) -> Path:
    return Path(output_prefix + ".tmp.journal")


def begin(journal: Journal, facts: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Begin the journal with `facts`, on which the datasets depend, or go on with it. facts: ready for JSON.

    UserError when it has records of a killed run and neither `resume` nor `overwrite` is set, or when that run had other facts.
    """
    records = [record for record in journal.records[1:] if record]
    if records and not resume and not overwrite:
        raise UserError(f"{journal.path} is of a run that was killed: --resume goes on where it was, --overwrite starts anew")
    if records and resume:
        earlier = journal.records[0]
        differing = [name for name in facts if earlier.get(name) != facts[name]]
        if differing:
            raise UserError(
                f"--resume: {journal.path} is of a run with other {', '.join(differing)}: "
                + "; ".join(f"{name} was {_short(earlier.get(name))}, is {_short(facts[name])}" for name in differing)
                + "; give it those again, or begin anew with --overwrite instead of --resume"
            )
        return
    journal.clear()
    journal.append(facts)


def output_paths(prefix: str) -> list[Path]:
    """The files and directories of a dataset, in the order in which they are published."""
    return [Path(prefix + ".bin"), tokenizer_directory(prefix), Path(prefix + ".idx"), manifest_path(prefix)]


def leftovers(prefix: str) -> list[Path]:
    """The files and directories that a killed run may leave beside a dataset."""
    return [
        *output_paths(temporary(prefix)),
        *(Path(temporary(prefix) + suffix) for suffix in (".lengths", ".digests")),
        *output_paths(temporary(prefix) + ".order"),
        Path(temporary(prefix) + ".order.lengths"),
        Path(temporary(prefix) + ".buckets"),
    ]


def publish(source_prefix: str, prefix: str) -> None:
    """Move a finished dataset to its final name. Doing it again does no harm.

    An older dataset loses manifest and index first, and the new one gets them last. So a crash in between may leave no index, or an
    index without a manifest, but never a mixture that looks whole.
    """
    pairs = list(zip(output_paths(source_prefix), output_paths(prefix), strict=True))
    pairs = [(source, target) for source, target in pairs if source.exists()]  # a killed run has moved the others
    for _, target in pairs:
        if target.is_dir() and not target.is_symlink() and target.suffix != ".tokenizer":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    remove(target for _, target in reversed(pairs))
    for source, target in pairs:
        os.replace(source, target)


def remove(paths: Iterable[Path]) -> None:
    """Delete files and directories. A link is deleted, not its target."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:120] + "..."
