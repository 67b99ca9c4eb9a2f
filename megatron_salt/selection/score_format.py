"""The teacher-score index on disk: one row a sample, written in shards by independent jobs that may be killed at any byte.

A sample is a window of a dataset. Samples are numbered 0..N-1 over all datasets, in --data-path order; the number is the row.

An index is a directory. `index.json` names the data and the teacher. Each shard is a directory `samples-<first>-<end>` with one numpy
file a column; the file has its full size from the start and is filled block by block. `blocks.journal` holds a digest of each finished
block: a resumed job keeps blocks that match their digest and scores the others again. `shard.json` is written last and holds the size
and hash of every column. Where a random part of the samples is scored (--sample), the columns are as long, with 0 for the others.
`score_writer.py` fills a shard, `score_reader.py` reads and merges an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megatron_salt.data.json_records import check_fields, check_types, read_record, write_record
from megatron_salt.data.manifest import DatasetFacts, content_hash
from megatron_salt.data.order import key_of, keyed_ranks
from megatron_salt.errors import UserError

FORMAT = 1
SAMPLED_FORMAT = 2  # of the index.json of an index of a part of the samples
INDEX, SHARD, JOURNAL = "index.json", "shard.json", "blocks.journal"
_SHARD_NAME = re.compile(r"samples-(\d{15})-(\d{15})")


def columns(top_k: Sequence[int], seq_length: int) -> dict[str, np.dtype]:
    """The columns of an index, in their order on disk, with their types.

    For each k, over the tokens of the window that count in the loss mask; l is the teacher's cross entropy of a token in nats:
      median_zeroed_{k}, mean_zeroed_{k}: of l, with 0 in place of l where the true token is outside the teacher's top k (the
        paper's formula: an indicator times the loss).
      median_dropped_{k}, mean_dropped_{k}: of l over the tokens inside the top k alone (the paper's words, "filtered"); 0, and not
        NaN, where no token is inside.
      share_{k}: share of the tokens that are inside the top k.
    Then `median`, `mean`: of l over all tokens; `entropy`: mean entropy of the teacher's distribution; `tokens`: how many tokens
    count; `content`: hash of the window's L + 1 tokens, see `content_hashes`. The median is numpy's: for an even number of values
    the mean of the middle two. A token is inside the top k when fewer than k logits are strictly greater than its own. A window
    without a token that counts has 0 everywhere.
    """
    score, count = np.dtype("<f4"), np.dtype("<u2" if seq_length <= 65535 else "<u4")
    kinds = ("median_zeroed", "mean_zeroed", "median_dropped", "mean_dropped", "share")
    return {
        **{f"{kind}_{k}": score for k in top_k for kind in kinds},
        **dict.fromkeys(("median", "mean", "entropy"), score),
        "tokens": count,
        "content": np.dtype("<u8"),
    }


def content_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hashes by which equal windows are found: blake2b, 8 bytes, of the token ids as little-endian int32.
    int64 [n, L + 1] -> uint64 [n]."""
    rows = np.ascontiguousarray(tokens, "<i4")
    digests = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8")


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """The contents of `index.json`: the data, the teacher and how it scored. Two jobs with equal manifests write the same rows."""

    datasets: tuple[DatasetFacts, ...]
    """In --data-path order, by which samples are numbered."""
    seq_length: int
    vocabulary: int
    """Number of real ids of the tokenizer."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    teacher: str
    """Fingerprint of the teacher's checkpoint."""
    teacher_step: int
    """Steps that the teacher was trained for."""
    teacher_directory: str
    """The teacher's checkpoint, where it lay when it scored."""
    top_k: tuple[int, ...]
    masking: dict[str, bool]
    """The flags eod_mask_loss, reset_position_ids and reset_attention_mask."""
    dtype: str
    """The precision of the teacher's computation: float32 or bfloat16."""
    micro_batch_size: int
    """Windows of one forward pass. Rounding may depend on it."""
    block_samples: int
    """Windows that are written together, and repeated together after a kill."""
    sample: float | None = None
    """Chance of each window to be scored. None: all windows are scored."""
    sample_seed: int | None = None
    """Chooses the windows that are scored. None where `sample` is None."""

    def __post_init__(self) -> None:
        assert self.block_samples >= 1 and self.datasets and all(dataset.samples >= 1 for dataset in self.datasets), self

    @property
    def num_samples(self) -> int:
        return sum(dataset.samples for dataset in self.datasets)

    def scored(self, first: int, end: int) -> np.ndarray:
        """Which of samples [first, end) have scores: bool [end - first]."""
        if self.sample is None:
            return np.ones(end - first, bool)
        return keyed_ranks(np.arange(first, end), key_of(f"score/{self.sample_seed}")) < np.uint64(self.sample * (1 << 64))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_samples // self.block_samples)

    @property
    def fingerprint(self) -> str:
        """`scores:` and a hash of all facts except paths."""
        facts = {**self._facts(), "datasets": [(dataset.fingerprint, dataset.samples) for dataset in self.datasets]}
        digest = content_hash()
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return f"scores:{digest.hexdigest()}"

    def differences(self, other: IndexManifest) -> list[str]:
        """What differs between this index, called "there", and another, called "here", a text for each fact. Paths do not count."""
        own, others = self._facts(), other._facts()
        differences = [
            f"{name} is {own.get(name)} there and {others.get(name)} here"
            for name in dict.fromkeys([*own, *others])
            if own.get(name) != others.get(name)
        ]
        return dataset_differences(self.datasets, other.datasets) + differences

    def _facts(self) -> dict[str, object]:
        """All facts except datasets and paths, by readable names."""
        plain = [
            field.name
            for field in fields(self)
            if field.name not in ("datasets", "teacher_directory", "masking") and getattr(self, field.name) is not None
        ]
        return {name.replace("_", " "): getattr(self, name) for name in plain} | self.masking


def dataset_differences(there: Sequence[DatasetFacts], here: Sequence[DatasetFacts]) -> list[str]:
    """What differs between two lists of datasets, a text for each fact. Paths do not count. Empty where both number the same samples."""
    differences = []
    for number, (first, second) in enumerate(zip_longest(there, here), 1):
        if first is None or second is None:
            differences.append(
                f"dataset {number}, {second.prefix}, is here alone"
                if first is None
                else f"dataset {number}, {first.prefix}, is there alone"
            )
            continue
        differences += [
            f"{name} of dataset {number}, {second.prefix}, is {getattr(first, name)} there and {getattr(second, name)} here"
            for name in ("samples", "fingerprint")
            if getattr(first, name) != getattr(second, name)
        ]
    return differences


def manifest_to_json(manifest: IndexManifest) -> dict[str, object]:
    """The inverse of `manifest_from_json`. `sample` and `sample_seed` are left out where all windows are scored."""
    return {name: value for name, value in asdict(manifest).items() if value is not None}


def write_index_manifest(manifest: IndexManifest, path: Path) -> None:
    """Write `index.json`. An index of a part of the samples has a format number of its own."""
    write_record(manifest_to_json(manifest), path, FORMAT if manifest.sample is None else SAMPLED_FORMAT)


def manifest_from_json(raw: dict, path: Path) -> IndexManifest:
    """The manifest whose JSON, in the file `path`, is `raw`. UserError where it cannot be read."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: the description of its scores is {str(raw)[:80]!r}, no mapping")
    if not {"sample", "sample_seed"} & set(raw):
        raw = {**raw, "sample": None, "sample_seed": None}
    check_fields(IndexManifest, raw, path)
    if (raw["sample"] is None) != (raw["sample_seed"] is None) or not (raw["sample"] is None or 0 < raw["sample"] < 1):
        raise UserError(
            f"{path}: sample is {raw['sample']} and sample_seed {raw['sample_seed']}; a sample is above 0 and below 1, and "
            "has a seed"
        )
    for facts in raw["datasets"]:
        check_types(DatasetFacts, facts, path)
    if not all(type(k) is int and k >= 1 for k in raw["top_k"]) or not all(
        type(value) is bool for value in raw["masking"].values()
    ):
        raise UserError(f"{path}: its top_k or masking cannot be read: {str(raw['top_k'])[:80]}, {str(raw['masking'])[:80]}")
    try:
        datasets = tuple(DatasetFacts(**facts) for facts in raw["datasets"])
        return IndexManifest(**{**raw, "datasets": datasets, "top_k": tuple(raw["top_k"])})
    except (TypeError, AssertionError) as error:
        raise UserError(f"{path}: its datasets cannot be read ({error})") from None


def read_index(directory: Path, flag_name: str) -> IndexManifest:
    """The manifest of an index. UserError, naming the flag, where the directory holds none."""
    path = directory / INDEX
    try:
        version, raw = read_record(path, (FORMAT, SAMPLED_FORMAT), "score the data again, or restore it")
    except FileNotFoundError:
        raise UserError(
            f"{flag_name} {directory} is no score index: it has no {INDEX}; tools/score_data.py makes one"
        ) from None
    manifest = manifest_from_json(raw, path)
    if (version == SAMPLED_FORMAT) != (manifest.sample is not None):
        raise UserError(f"{path} has manifest format {version}, which does not go with sample {manifest.sample}")
    return manifest


def claim(directory: Path, manifest: IndexManifest) -> None:
    """Make `directory` the index of `manifest`, unless it is that already. Any number of jobs may call at once.

    UserError, naming what differs, where it is another index.
    """
    path, temporary = directory / INDEX, directory / f"{INDEX}.{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_index_manifest(manifest, temporary)
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)  # a link, unlike a rename, replaces nothing: the file of the first job stays
            finally:
                temporary.unlink()
    except OSError as error:
        raise UserError(f"--output {directory} cannot be written: {error.strerror} ({error.filename})") from error
    differences = read_index(directory, "--output").differences(manifest)
    if differences:
        raise UserError(f"--output {directory} is an index of other scores ({INDEX}): {'; '.join(differences)}")


def shard_blocks(num_blocks: int, shard: tuple[int, int]) -> range:
    """The blocks of shard i of n. Shards differ by at most one block; some have none where there are fewer blocks than shards."""
    i, n = shard
    assert 0 <= i < n, shard
    return range(num_blocks * i // n, num_blocks * (i + 1) // n)


def shard_paths(directory: Path) -> list[tuple[int, int, Path]]:
    """(first sample, end, path) of every shard of an index, finished or not, in the order of samples."""
    matches = [(_SHARD_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)


def samples_of(manifest: IndexManifest, blocks: range) -> tuple[int, int]:
    """(first sample, end) of consecutive blocks."""
    size = manifest.block_samples
    return blocks.start * size, min(blocks.stop * size, manifest.num_samples)


def shard_path(directory: Path, manifest: IndexManifest, blocks: range) -> Path:
    """Directory of the shard with these blocks."""
    first, end = samples_of(manifest, blocks)
    return directory / f"samples-{first:015d}-{end:015d}"


def is_finished(directory: Path, manifest: IndexManifest, blocks: range) -> bool:
    """Whether the shard with these blocks is finished."""
    return (shard_path(directory, manifest, blocks) / SHARD).exists()


def column_path(shard: Path, column: str) -> Path:
    return shard / f"{column}.npy"


def npy_header(dtype: np.dtype, rows: int) -> bytes:
    """Header of the .npy file of a column."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    )
    return header.getvalue()


def write_shard_manifest(shard: Path, manifest: IndexManifest, first: int, end: int, hashes: Mapping[str, str]) -> None:
    """Write `shard.json`, which marks the shard as finished. hashes: content hash of each column's file."""
    files = {name: {"bytes": column_path(shard, name).stat().st_size, "hash": digest} for name, digest in hashes.items()}
    write_record({"index": manifest.fingerprint, "first": first, "end": end, "columns": files}, shard / SHARD, FORMAT)
