"""Edits the file of a SentencePiece model, a protocol buffer: makes a piece a control piece, which no text gives. Pure.

SentencePiece always matches a user-defined piece in a text, may match a normal piece, and never matches a control piece. The rest of the
file stays as it is, so other texts keep their ids.
"""

from __future__ import annotations

from collections.abc import Iterator

_PIECES, _PIECE, _TYPE = 1, 1, 3  # ModelProto.pieces, SentencePiece.piece, SentencePiece.type
_CONTROL, _USER_DEFINED = 3, 4  # values of SentencePiece.Type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
