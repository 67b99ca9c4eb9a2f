"""Edits and writes the file of a SentencePiece model, a protocol buffer: makes a piece a control piece, which no text gives. Pure.

SentencePiece always matches a user-defined piece in a text, may match a normal piece, and never matches a control piece. The rest of the
file stays as it is, so other texts keep their ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_PIECES, _PIECE, _TYPE = 1, 1, 3  # ModelProto.pieces, SentencePiece.piece, SentencePiece.type
_CONTROL, _USER_DEFINED = 3, 4  # values of SentencePiece.Type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTE = 6  # a value of SentencePiece.Type


@dataclass(frozen=True)
class Piece:
    """One token of a SentencePiece model."""

    text: str
    score: float
    """Pieces with a higher score are merged first."""
    kind: int
    """SentencePiece.Type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte."""


def model_of_pieces(
    pieces: Sequence[Piece], *, unknown: int, bos: int | None, eos: int | None, add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:  # fmt: skip
    """The file of a BPE model without a table of normalisation. Field numbers: sentencepiece_model.proto of SentencePiece."""
    listed = [
        _field(_PIECES, _field(_PIECE, piece.text.encode()) + _float(2, piece.score) + _number(_TYPE, piece.kind))
        for piece in pieces
    ]
    byte_fallback = any(piece.kind == _BYTE for piece in pieces)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, int(byte_fallback)) + _number(40, unknown)
    trainer += _number(41, -1 if bos is None else bos) + _number(42, -1 if eos is None else eos) + _number(43, -1)
    normalizer = _field(1, b"identity") + _number(3, int(add_dummy_prefix)) + _number(4, int(remove_extra_whitespaces))
    return b"".join(listed) + _field(2, trainer) + _field(3, normalizer + _number(5, 1))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A field with an integer; a negative one takes 64 bits."""
    return _varint(number << 3 | _VARINT) + _varint(value & (1 << 64) - 1)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)


def with_control_piece(model: bytes, piece: int) -> bytes:
    """The model, with piece number `piece` as a control piece. ValueError where it has no such piece."""
    parts, number = [], -1
    for field, start, value, end in _fields(model):
        number += field == _PIECES
        if field == _PIECES and number == piece:
            kept = b"".join(model[at:until] for inner, at, _, until in _fields(model, value, end) if inner != _TYPE)
            kept += bytes([_TYPE << 3 | _VARINT, _CONTROL])
            parts.append(bytes([_PIECES << 3 | _BYTES]) + _varint(len(kept)) + kept)
        else:
            parts.append(model[start:end])
    if not 0 <= piece <= number:
        raise ValueError(f"no piece {piece} among {number + 1}")
    return b"".join(parts)


def user_defined_pieces(model: bytes) -> list[str]:
    """User-defined pieces: SentencePiece matches them anywhere in a text."""
    pieces = []
    for field, _, value, end in _fields(model):
        if field == _PIECES:
            inner = {number: model[at:until] for number, _, at, until in _fields(model, value, end)}
            if inner.get(_TYPE) == bytes([_USER_DEFINED]):
                pieces.append(inner[_PIECE].decode("utf-8", errors="replace"))
    return pieces


def _fields(buffer: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start, start of the value, end) of each field in buffer[start:end]."""
    at, end = start, len(buffer) if end is None else end
    while at < end:
        first = at
        key, at = _read_varint(buffer, at)
        value, wire = at, key & 7
        if wire == _VARINT:
            _, at = _read_varint(buffer, at)
        elif wire == _BYTES:
            size, value = _read_varint(buffer, at)
            at = value + size
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, first, value, at


def _read_varint(buffer: bytes, at: int) -> tuple[int, int]:
    """(value, end) of the variable-length integer at `at`."""
    result = shift = 0
    while True:
        byte = buffer[at]
        result, shift, at = result | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return result, at


def _varint(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])
