"""Chunks of text to token ids.

What a chunk becomes is a pure function of its bytes, the tokenizer and the settings. `worker_pool.py` does the same in several
processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.preprocess.indexed_writer import token_dtype
from megatron_salt.preprocess.parse import Parsed, Parser
from megatron_salt.preprocess.readers import Chunk
from megatron_salt.preprocess.tokenizer_backends import Backend, encode_with
from megatron_salt.tokenizer.special_tokens import SpecialTokenCounts, SpecialTokenFinder
from megatron_salt.tokenizer.tokenizer import Tokenizer

_MOST_TOKENS = (1 << 31) - 2  # of a document; the end-of-document id comes on top
_TEXT_AT_A_TIME = 1 << 18  # characters; a tokenizer needs many times the memory of its text


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How documents are encoded. With a tokenizer's files it is all that another process needs to make the same Encoder."""

    backend: Backend
    keys: tuple[str, ...]
    """Keys of a JSON object, or columns of a table, that hold documents."""
    append_eod: bool
    prepend_bos: bool = False
    digests: bool = False
    """Whether each text is hashed, to find repetitions."""


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of one chunk as token ids."""

    chunk: Chunk
    """Without its bytes."""
    lines: int
    """Lines or rows, blank ones included."""
    documents: int
    """Lines that are not blank."""
    bad: list[tuple[int, str, str]]
    """(line from 0, kind, reason) of each line that was left out."""
    text_bytes: list[int]
    """Size of the texts in UTF-8, per key."""
    ids: list[np.ndarray]
    """Ids of all documents end to end, per key."""
    lengths: list[np.ndarray]
    """Tokens of each document, per key: int32 [documents], each at least 1."""
    empty: list[int]
    """Number of documents without a token, per key."""
    digests: list[np.ndarray]
    """Hash of each text, per key: uint64 [documents, 2]. Empty unless asked for."""
    special: list[SpecialTokenCounts]
    """Special tokens in the texts, per key."""


class Encoder:
    """Chunk -> EncodedChunk: a pure function of the tokenizer and the settings."""

    def __init__(self, tokenizer: Tokenizer, settings: EncoderSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self._parse = Parser(settings.keys)
        self._encode = encode_with(tokenizer, settings.backend)
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        self._eod = tokenizer.eod if settings.append_eod else None
        self._bos = tokenizer.bos if settings.prepend_bos else None
        self._find = SpecialTokenFinder(tokenizer.special)
        self._is_forbidden = np.zeros(tokenizer.vocabulary_size, np.bool_)
        self._is_forbidden[list(tokenizer.forbidden)] = True
        assert self._eod is not None or not settings.append_eod
        assert self._bos is not None or not settings.prepend_bos

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """UserError when the chunk's file cannot be read."""
        parsed = self._parse(chunk.form, chunk.read())
        columns = [self._encode_column(chunk, texts) for texts in parsed.texts]
        return EncodedChunk(
            chunk=replace(chunk, data=None),
            lines=parsed.lines,
            documents=parsed.documents,
            bad=parsed.bad,
            text_bytes=[sum(len(text.encode()) for text in texts) for texts in parsed.texts],
            ids=[ids for ids, _, _ in columns],
            lengths=[lengths for _, lengths, _ in columns],
            empty=[len(texts) - len(lengths) for texts, (_, lengths, _) in zip(parsed.texts, columns, strict=True)],
            digests=self._hash(parsed, [has_tokens for _, _, has_tokens in columns]),
            special=[self._find(texts) for texts in parsed.texts],
        )

    def _encode_column(self, chunk: Chunk, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids of all texts, int32 lengths of the texts with a token, which texts have one: bool [texts])."""
        parts, sizes = [np.empty(0, self._dtype)], [np.empty(0, np.int64)]
        for some in _portions(texts):
            ids, lengths = self._encode(some)
            if self._is_forbidden[ids].any():
                self._refuse_forged(some, ids, lengths)
            parts.append(ids.astype(self._dtype))
            sizes.append(lengths)
        ids, counts = np.concatenate(parts), np.concatenate(sizes)
        has_tokens = counts > 0
        if counts.max(initial=0) > _MOST_TOKENS:
            raise UserError(
                f"--input {chunk.path}: a document from {chunk.start} on has {counts.max()} tokens, more than the "
                f"{_MOST_TOKENS} that Megatron's index can count; cut it"
            )
        lengths = counts[has_tokens].astype(np.int32)
        if self._bos is not None:
            ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64) - lengths, self._bos)
            lengths += np.int32(1)
        if self._eod is not None:
            ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64), self._eod)
            lengths += np.int32(1)
        return ids, lengths, has_tokens

    def _refuse_forged(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        at = int(np.argmax(self._is_forbidden[ids]))
        text = texts[int(np.searchsorted(np.cumsum(lengths), at, side="right"))]
        names = [name for name, i in self.tokenizer.special.items() if i == ids[at]]
        raise UserError(
            f"--special-tokens-in-text split: for {text[:80]!r} the {self.tokenizer.kind} gives {' '.join(map(repr, names))} "
            f"(id {ids[at]}) without being asked; only encode takes this text"
        )

    def _hash(self, parsed: Parsed, has_tokens: list[np.ndarray]) -> list[np.ndarray]:
        if not self.settings.digests:
            return []
        return [
            text_digests([text for text, kept in zip(texts, mask, strict=True) if kept])
            for texts, mask in zip(parsed.texts, has_tokens, strict=True)
        ]


def text_digests(texts: Sequence[str]) -> np.ndarray:
    """A hash of each text: uint64 [texts, 2]. Different texts have different hashes, up to a chance of 2^-128."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(joined, "<u8").reshape(len(texts), 2)


def _portions(texts: list[str]) -> Iterable[list[str]]:
    """The texts in groups of about _TEXT_AT_A_TIME characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _TEXT_AT_A_TIME:
            yield group
            group, size = [], 0
    if group:
        yield group
