"""The bytes of text that each id of a tokenizer stands for. Pure: read from the tokenizer's own files.

Byte-level vocabularies write a byte as a character (GPT-2's way), SentencePiece writes a space as U+2581 and a lone byte as <0xNN>.
Added and special tokens stand for their own names. So for text that a lossless tokenizer encodes, the bytes of its ids, joined, are the
text's; a tokenizer that puts a space before every text has that space too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megatron_salt.small_files import parse_json
from megatron_salt.tokenizer.library import BYTE_LEVEL_EOD, BYTE_LEVEL_NAME
from megatron_salt.tokenizer.tokenizer import Tokenizer

SPACE = "\u2581"
_LONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTED = [
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
]  # bytes that byte-level vocabularies write as themselves
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))
}


def id_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Bytes of each id in [0, vocabulary_size). An id without a token has none; a special token has its name's."""
    readers = {
        "SentencePieceTokenizer": lambda: _of_sentencepiece(tokenizer.files["tokenizer.model"]),
        "HuggingFaceTokenizer": lambda: _of_tokenizer_json(parse_json(tokenizer.files["tokenizer.json"])),
        "GPT2BPETokenizer": lambda: _of_vocabulary(parse_json(tokenizer.files["vocab.json"]), byte_level),
        "ByteLevelTokenizer": lambda: {i: bytes([i]) for i in range(256)} | {BYTE_LEVEL_EOD: BYTE_LEVEL_NAME.encode()},
    }
    known = readers[tokenizer.kind]()
    return [known.get(i, b"") for i in range(tokenizer.vocabulary_size)]


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id stands for: int64 [vocabulary_size]. The ids that end and begin documents are no text: 0."""
    counts = np.array([len(token) for token in id_bytes(tokenizer)], np.int64)
    counts[[i for i in (tokenizer.eod, tokenizer.bos) if i is not None]] = 0
    return counts


def byte_level(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells; of any other token, its own."""
    return bytes(_BYTE_OF[char] for char in token) if _BYTE_OF.keys() >= {*token} else token.encode()


def with_spaces(token: str) -> bytes:
    """The bytes of a piece that writes a space as U+2581."""
    return token.replace(SPACE, " ").encode()


def with_lone_bytes(token: str) -> bytes:
    """`with_spaces`, where <0xNN> is one byte."""
    lone = _LONE_BYTE.fullmatch(token)
    return with_spaces(token) if lone is None else bytes([int(lone.group(1), 16)])


def _of_vocabulary(vocabulary: Mapping[str, int], spelled: Any) -> dict[int, bytes]:
    return {int(i): spelled(token) for token, i in vocabulary.items()}


def _of_sentencepiece(model: bytes) -> dict[int, bytes]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return {
        i: (with_lone_bytes if processor.is_byte(i) else with_spaces)(processor.id_to_piece(i))
        for i in range(processor.vocab_size())
    }


def _of_tokenizer_json(content: Mapping[str, Any]) -> dict[int, bytes]:
    model = content["model"]
    steps = [step for name in ("normalizer", "pre_tokenizer", "decoder") for step in _steps(content.get(name))]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        spelled: Any = byte_level
    elif model.get("byte_fallback") or "ByteFallback" in kinds:
        spelled = with_lone_bytes
    elif SPACE in json.dumps(steps, ensure_ascii=False):
        spelled = with_spaces
    else:
        spelled = str.encode
    vocabulary = model["vocab"]
    if not isinstance(vocabulary, dict):  # a unigram model: pairs of piece and score
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    added = {token["id"]: token["content"].encode() for token in content.get("added_tokens") or ()}
    return _of_vocabulary(vocabulary, spelled) | added


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json, and the steps that it is a sequence of."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for step in part.get(name) or ():
                yield from _steps(step)
