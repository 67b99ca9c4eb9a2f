"""The manifest of a tokenised dataset, and the fingerprint by which runs and scores name the dataset.

Preprocessing writes `<prefix>.manifest.json` beside `<prefix>.bin` and `<prefix>.idx`: counts, tokenizer, sources, and hashes of all bytes.
A dataset with a manifest has a `content:` fingerprint. A dataset of another tool has no manifest and gets a `sampled:` fingerprint: a
hash of sizes, index header and a fixed sample of blocks. It is cheap, and does not see changes between the blocks. Start-up reads the
same sample in both cases; verify=True reads everything.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_salt.data.indexed_dataset import HEADER
from megatron_salt.data.json_records import check_fields, check_types, read_record, write_record
from megatron_salt.errors import UserError, file_error
from megatron_salt.files import reading

FORMAT = 1
_BLOCK_BYTES = 4096
_BLOCKS = 32  # of each file
_TOKEN_TYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64")


def content_hash() -> hashlib.blake2b:
    """A new hash object of the kind that manifests hold: update it with the bytes of a file, in order."""
    return hashlib.blake2b(digest_size=32)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file of preprocessing, and what became of it."""

    file: str
    """The path as it was given to preprocessing."""
    size_bytes: int
    lines: int
    documents: int
    """Documents written."""
    empty_documents: int
    """Texts without a token; they are left out."""
    rejected_lines: int
    """Lines that were left out as bad (--max-bad-lines)."""
    text_bytes: int = 0
    """Size in UTF-8 of the texts that were encoded; 0: not recorded."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rejected lines."""
    form: str = ""
    """How the file was read: jsonl, text, file or columns; empty: not recorded."""
    sampled: str = ""
    """The `sampled:` hash of the file; empty: it was a pipe, or not recorded."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `<prefix>.manifest.json`. Hashes are hexadecimal blake2b-256."""

    documents: int
    tokens: int
    dtype: str
    """numpy's name of the stored ids' type: uint16 or int32."""
    bin_bytes: int
    idx_bytes: int
    bin_hash: str
    idx_hash: str
    sampled: str
    """The `sampled:` fingerprint of the same files: a cheap check at every start."""
    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int | None
    """End-of-document id; None: the tokenizer has none."""
    append_eod: bool
    """Whether every document ends with eod."""
    json_key: str
    sources: tuple[Source, ...]
    shard: str | None = None
    """i/n: the dataset is the i-th of n parts of its input; None: it is all of it."""
    duplicates: int = 0
    """Documents left out because an equal text came before (--dedup)."""
    shuffle_seed: int | None = None
    """--shuffle-documents; None: documents lie in input order."""
    tokenizer_backends: tuple[str, ...] = ()
    """Backends that encoded (--tokenizer-backend); several after a resumed run or a merge. Empty: not recorded."""
    bos: int | None = None
    """The id at the beginning of every document (--prepend-bos); None: there is none."""
    special_tokens_in_text: str = ""
    """encode, split or refuse; empty: not recorded."""
    special_documents: int = 0
    """Documents whose text has special tokens."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """Token -> occurrences in texts."""
    dedup: str = ""
    """none or exact; empty: not recorded."""

    @property
    def fingerprint(self) -> str:
        """`content:` and the hash of both files' hashes: the same for equal files, wherever they lie."""
        return _content_fingerprint(self.bin_hash, self.idx_hash)


@dataclass(frozen=True)
class DatasetFacts:
    """Facts by which a score index and a run recognise a dataset."""

    prefix: str
    """Path at the time of scoring: for people, and for tools that show the text."""
    fingerprint: str
    """Answer of the function `fingerprint`."""
    samples: int
    """Number of its windows, held-out ones included."""


def manifest_path(prefix: str) -> Path:
    """Path of the manifest of a dataset."""
    return Path(prefix + ".manifest.json")


def tokenizer_directory(prefix: str) -> Path:
    """Directory with a copy of the tokenizer that made the dataset; `load_tokenizer` reads it."""
    return Path(prefix + ".tokenizer")


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest as JSON; the file appears whole or not at all."""
    write_record(asdict(manifest), path, FORMAT)


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest of a dataset; None where there is no file. UserError when it cannot be understood."""
    path = manifest_path(prefix)
    try:
        _, raw = read_record(path, (FORMAT,), "restore it, or delete it to use the dataset without one")
    except FileNotFoundError:
        return None
    added = {
        name: getattr(Manifest, name)  # manifests of older releases lack these
        for name in ("shard", "duplicates", "shuffle_seed", "bos", "special_tokens_in_text", "special_documents", "dedup")
    }
    raw = {**added, "tokenizer_backends": [], "special_tokens": {}, **raw}
    check_fields(Manifest, raw, path)
    if raw["dtype"] not in _TOKEN_TYPES:
        raise UserError(f"{path}: dtype is {raw['dtype']!r}; token ids are {' or '.join(_TOKEN_TYPES)}")
    if not all(isinstance(name, str) for name in raw["tokenizer_backends"]):
        raise UserError(f"{path}: tokenizer_backends should be names, they are {str(raw['tokenizer_backends'])[:80]}")
    if not all(type(count) is int and count >= 0 for count in raw["special_tokens"].values()):
        raise UserError(f"{path}: special_tokens should be counts, they are {str(raw['special_tokens'])[:80]}")
    for source in raw["sources"]:
        check_types(Source, source, path)
    try:
        raw["sources"] = tuple(Source(**source) for source in raw["sources"])
        raw["tokenizer_backends"] = tuple(raw["tokenizer_backends"])
    except TypeError as error:
        raise UserError(f"{path}: its sources cannot be read ({error})") from None
    return Manifest(**raw)


def sampled_fingerprint(prefix: str) -> str:
    """`sampled:` and a hash of both sizes, of the index header and of up to 32 blocks of 4 KiB spread over each file."""
    digest = content_hash()
    for suffix in (".idx", ".bin"):
        size = _size(prefix, suffix)
        digest.update(f"{suffix} {size}\n".encode())
        with reading(prefix + suffix), open(prefix + suffix, "rb") as stream:
            if suffix == ".idx":
                digest.update(stream.read(HEADER.size))
            _add_blocks(digest, stream, size)
    return f"sampled:{digest.hexdigest()}"


def sampled_hash(path: Path) -> str:
    """`sampled:` and a hash of the size and of up to 32 blocks of one file of any kind."""
    digest = content_hash()
    with reading(path), open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(f"{size}\n".encode())
        _add_blocks(digest, stream, size)
    return f"sampled:{digest.hexdigest()}"


def fingerprint(prefix: str, verify: bool = False) -> str:
    """Names the contents of a dataset: `content:<hash>` or `sampled:<hash>` (see the docstring of the module).

    If there is a manifest, the sizes and the sampled blocks must agree with it. verify=True (--verify-data) hashes all bytes of both
    files, compares them with the manifest if there is one, and always gives the `content:` kind.
    UserError when files are missing or disagree with the manifest.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        if not verify:
            return sampled_fingerprint(prefix)
        return _content_fingerprint(_hash_file(prefix, ".bin"), _hash_file(prefix, ".idx"))
    path = manifest_path(prefix)
    for suffix, expected in ((".bin", manifest.bin_bytes), (".idx", manifest.idx_bytes)):
        size = _size(prefix, suffix)
        if size != expected:
            raise UserError(f"{prefix}{suffix} has {size} bytes, its manifest {path} says {expected}")
    if manifest.tokens * np.dtype(manifest.dtype).itemsize != manifest.bin_bytes:
        raise UserError(
            f"{path} contradicts itself: {manifest.tokens} tokens of {manifest.dtype} are not {manifest.bin_bytes} bytes"
        )
    if verify:
        for suffix, recorded in ((".bin", manifest.bin_hash), (".idx", manifest.idx_hash)):
            actual = _hash_file(prefix, suffix)
            if actual != recorded:
                raise UserError(
                    f"--verify-data: {prefix}{suffix} has content hash {actual}, its manifest {path} says {recorded}"
                )
    sampled = sampled_fingerprint(prefix)
    if sampled != manifest.sampled:
        raise UserError(
            f"{prefix}.bin and .idx are not the files that their manifest {path} describes: "
            f"their blocks give {sampled}, the manifest says {manifest.sampled}"
        )
    return manifest.fingerprint


def _content_fingerprint(bin_hash: str, idx_hash: str) -> str:
    digest = content_hash()
    digest.update(f"{bin_hash} {idx_hash}".encode())
    return f"content:{digest.hexdigest()}"


def _add_blocks(digest: hashlib.blake2b, stream: BinaryIO, size: int) -> None:
    for offset in _block_offsets(size):
        stream.seek(offset)
        digest.update(stream.read(_BLOCK_BYTES))


def _block_offsets(size: int) -> list[int]:
    """Offsets of the first, the last and evenly spread blocks; all blocks of a small file."""
    blocks = -(-size // _BLOCK_BYTES)
    chosen = min(blocks, _BLOCKS)
    if chosen < 2:
        return [0] * chosen
    return [i * (blocks - 1) // (chosen - 1) * _BLOCK_BYTES for i in range(chosen)]


def _size(prefix: str, suffix: str) -> int:
    try:
        return os.path.getsize(prefix + suffix)
    except OSError as error:
        raise file_error(
            f"{prefix}{suffix} cannot be read ({error.strerror}): --data-path and --valid-data-path take the "
            "common prefix of a .bin and an .idx file",
            error,
        ) from None


def _hash_file(prefix: str, suffix: str) -> str:
    _size(prefix, suffix)
    with reading(prefix + suffix), open(prefix + suffix, "rb") as stream:
        return hashlib.file_digest(stream, content_hash).hexdigest()
