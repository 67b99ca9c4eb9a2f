"""A selection on disk: the samples that stage 1 draws from, and the scores and the rule by which they were chosen.

`PREFIX.npy` is a plain numpy file of the chosen ids, ascending. `PREFIX.json` describes it and is written last.

The list is mapped into memory. Opening it costs nothing, and all processes of a node share one copy in the page cache. The j-th id is
one read; membership, and the j-th id that is *not* chosen, are bisections. A compressed bitmap would be smaller where much is chosen
(a tenth of 10^9 samples: 0.06 GB at best instead of 0.4 GB). But then the j-th id would be a search, and every process would have a
copy.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_salt.data.json_records import check_fields, read_record, write_record
from megatron_salt.data.manifest import DatasetFacts, content_hash, sampled_hash
from megatron_salt.errors import UserError
from megatron_salt.files import reading, whole_file
from megatron_salt.selection.score_format import (
    IndexManifest,
    dataset_differences,
    manifest_from_json,
    manifest_to_json,
    npy_header,
)

FORMAT = 2
_WITHOUT_TIES = 1  # an older format, which is read too: of equal scores the lower id was taken, and ties were not counted


@dataclass(frozen=True, kw_only=True)
class SelectionManifest:
    """The contents of `PREFIX.json`."""

    num_samples: int
    """Samples of all datasets, held-out ones included. Ids are below this."""
    num_selected: int
    dtype: str
    """numpy's name of the type of the ids: uint32 where that can hold every id, else int64."""
    npy_bytes: int
    npy_hash: str
    """blake2b-256 of `PREFIX.npy`, hexadecimal."""
    sampled: str
    """The `sampled:` hash of `PREFIX.npy`, which is quick to check at every start."""
    scores: IndexManifest
    """The index that the scores are from."""
    rule: dict[str, Any]
    """The rule by which the ids were chosen, with every number."""
    valid_share: float
    """The --valid-share whose held-out windows were left out."""
    tie_seed: int | None
    """Orders samples of one score. None where the rule orders nothing, and in files of format 1 (the lower id came first)."""
    tie_share: float | None
    """Share of the chosen samples that ties decided. None in files of format 1."""


@dataclass(frozen=True)
class Selection:
    """An open selection."""

    path: Path
    """`PREFIX.npy`."""
    manifest: SelectionManifest
    ids: np.ndarray
    """uint32 or int64 [num_selected], ascending, in a mapped file."""
    flag_name: str
    """The flag that named the selection, for error messages."""

    @classmethod
    def open(cls, path: str, flag_name: str = "--stage1-selection") -> Selection:
        """Open PREFIX, PREFIX.npy or PREFIX.json; O(1) in the number of ids. UserError where a file is missing or has changed."""
        npy, description = selection_paths(path)
        told = f"{flag_name} {path}"
        try:
            version, raw = read_record(description, (_WITHOUT_TIES, FORMAT), "select again, or restore it")
            if version == _WITHOUT_TIES:
                raw = {**raw, "tie_seed": None, "tie_share": None}
            check_fields(SelectionManifest, raw, description)
            manifest = SelectionManifest(**{**raw, "scores": manifest_from_json(raw["scores"], description)})
            size = npy.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{told}: {error.filename} does not exist; it takes PREFIX of PREFIX.npy and PREFIX.json") from None
        if size != manifest.npy_bytes:
            how = "truncated" if size < manifest.npy_bytes else "longer than its manifest says"
            raise UserError(f"{told}: {npy} is {how}: it has {size} bytes, {description} says {manifest.npy_bytes}")
        sampled = sampled_hash(npy)
        if sampled != manifest.sampled:
            raise UserError(
                f"{told}: {npy} is not the file that {description} describes: its blocks give {sampled}, "
                f"the manifest says {manifest.sampled}"
            )
        try:
            with reading(npy, f"{told}: "):
                ids = np.load(npy, mmap_mode="r")
        except (ValueError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{told}: {npy} cannot be read: {str(error).splitlines()[0]}") from None
        if ids.dtype != manifest.dtype or ids.shape != (manifest.num_selected,):
            raise UserError(
                f"{told}: {npy} holds {ids.dtype} {ids.shape}, {description} says {manifest.dtype} ({manifest.num_selected},)"
            )
        return cls(npy, manifest, ids, flag_name)

    @property
    def fingerprint(self) -> str:
        """`selection:` and the hash of `PREFIX.npy`: the same for equal ids, whatever the path."""
        return f"selection:{self.manifest.npy_hash}"

    def between(self, first: int, end: int) -> slice:
        """Positions in the list of the ids in [first, end)."""
        return slice(bisect_left(self.ids, first), bisect_left(self.ids, end))

    def verify(self) -> None:
        """Read every byte of the list. UserError where its hash is not the recorded one."""
        with reading(self.path, f"{self.flag_name}: "), open(self.path, "rb") as stream:
            actual = hashlib.file_digest(stream, content_hash).hexdigest()
        if actual != self.manifest.npy_hash:
            raise UserError(
                f"{self.flag_name}: {self.path} has content hash {actual}, its manifest says {self.manifest.npy_hash}"
            )


def selection_paths(path: str) -> tuple[Path, Path]:
    """(PREFIX.npy, PREFIX.json) of PREFIX or of either of them."""
    prefix = path.removesuffix(".npy").removesuffix(".json")
    return Path(prefix + ".npy"), Path(prefix + ".json")


def refuse_other_data(
    selection: Selection, datasets: Sequence[DatasetFacts], seq_length: int, tokenizer_fingerprint: str
) -> None:
    """Raise UserError where a selection was chosen from other samples than those of these datasets, in this order."""
    scores = selection.manifest.scores
    differences = [
        f"{name} is {selected} there and {own} here"
        for name, selected, own in (
            ("--seq-length", scores.seq_length, seq_length),
            ("the tokenizer", scores.tokenizer, tokenizer_fingerprint),
        )
        if selected != own
    ]
    differences += dataset_differences(scores.datasets, datasets)
    if differences:
        raise UserError(
            f"{selection.flag_name} {selection.path} was chosen from other samples than this run has: {'; '.join(differences)}"
        )


def write_selection(
    prefix: str,
    chunks: Iterable[np.ndarray],
    *,
    num_selected: int,
    scores: IndexManifest,
    rule: dict[str, Any],
    valid_share: float,
    tie_seed: int | None = None,
    tie_share: float = 0.0,
) -> SelectionManifest:
    """Write PREFIX.npy and PREFIX.json, each whole or not at all. Files that are there stay until both new ones are on disk.

    chunks: the `num_selected` ids, ascending, int64 [n] each. scores, rule, valid_share, tie_seed, tie_share: as in `SelectionManifest`.
    """
    npy, description = selection_paths(prefix)
    dtype = np.dtype("<u4" if scores.num_samples <= 1 << 32 else "<i8")
    digest, count = content_hash(), 0
    npy.parent.mkdir(parents=True, exist_ok=True)
    # The old description goes when both files are on the disk; then the ids get their name, and the description last.
    with whole_file(description) as described, whole_file(npy) as temporary:
        with open(temporary, "wb") as stream:
            for piece in _pieces(npy_header(dtype, num_selected), chunks, dtype):
                stream.write(piece)
                digest.update(piece)
                count += len(piece)
            stream.flush()
            os.fsync(stream.fileno())
        assert count == len(npy_header(dtype, num_selected)) + num_selected * dtype.itemsize, (count, num_selected)
        manifest = SelectionManifest(
            num_samples=scores.num_samples,
            num_selected=num_selected,
            dtype=dtype.name,
            npy_bytes=count,
            npy_hash=digest.hexdigest(),
            sampled=sampled_hash(temporary),
            scores=scores,
            rule=rule,
            valid_share=valid_share,
            tie_seed=tie_seed,
            tie_share=tie_share,
        )
        write_record({**asdict(manifest), "scores": manifest_to_json(scores)}, described, FORMAT)
        description.unlink(missing_ok=True)
    return manifest


def _pieces(header: bytes, chunks: Iterable[np.ndarray], dtype: np.dtype) -> Iterable[bytes]:
    yield header
    last = -1
    for ids in chunks:
        if len(ids):
            assert ids[0] > last and bool((np.diff(ids) > 0).all()), "ids must ascend"
            last = int(ids[-1])
            yield ids.astype(dtype).tobytes()
