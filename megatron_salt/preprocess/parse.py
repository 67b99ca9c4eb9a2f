"""Raw bytes of a chunk to texts: JSON lines, plain text, or the packed columns of a table.

msgspec parses JSON: it is fast and reads only the keys that are asked for. A line that it refuses goes to the standard library's parser,
`inputs.json_texts`, whose verdict counts. So the fast parser never decides what is accepted, or why a line is bad. One exception:
msgspec may pass over a malformed value of another key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from megatron_salt.preprocess.inputs import BadLine, decode_line, json_texts
from megatron_salt.preprocess.parquet import unpack
from megatron_salt.preprocess.readers import Form, sample_chunks

_SAMPLE_CHUNK, _SAMPLE_CHARACTERS = 1 << 17, 2 << 20


@dataclass
class Parsed:
    """The documents of a chunk."""

    texts: list[list[str]]
    """Texts of all documents, per key."""
    lines: int = 0
    """Lines or rows, blank ones included."""
    documents: int = 0
    """Lines that are not blank."""
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    """(line from 0, kind, reason) of each document that was left out."""


class Parser:
    """(form, bytes) -> Parsed, for the documents under `keys`."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(keys)
        fields = [(f"key{i}", str, msgspec.field(name=key)) for i, key in enumerate(keys)]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Row", fields, gc=False)).decode
        self._names = [name for name, _, _ in fields]

    def __call__(self, form: Form, data: bytes) -> Parsed:
        parsed = Parsed([[] for _ in self._keys])
        if form == "jsonl":
            self._json_lines(data, parsed)
        elif form == "text":
            self._text_lines(data, parsed)
        elif form == "file":
            _add(parsed, 0, [data])
            parsed.lines = 1
        else:
            self._rows(data, parsed)
        return parsed

    def _json_lines(self, data: bytes, parsed: Parsed) -> None:
        fast = _is_utf8(data)  # msgspec does not check the encoding of values that it skips
        for number, line in enumerate(_lines(data)):
            parsed.lines += 1
            if not line or not line.strip():
                continue
            parsed.documents += 1
            try:
                texts = self._texts(line) if fast else json_texts(line, self._keys)
            except BadLine as reason:
                parsed.bad.append((number, reason.kind, str(reason)))
                continue
            for column, text in zip(parsed.texts, texts, strict=True):
                column.append(text)

    def _texts(self, line: bytes) -> list[str]:
        try:
            row = self._decode(line)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return json_texts(line, self._keys)
        return [getattr(row, name) for name in self._names]

    def _text_lines(self, data: bytes, parsed: Parsed) -> None:
        for number, line in enumerate(_lines(data)):
            parsed.lines += 1
            if line.strip():
                _add(parsed, number, [line.removesuffix(b"\r")])

    def _rows(self, data: bytes, parsed: Parsed) -> None:
        for number, row in enumerate(zip(*unpack(data, len(self._keys)), strict=True)):
            parsed.lines += 1
            missing = next((key for key, value in zip(self._keys, row, strict=True) if value is None), None)
            if missing is None:
                _add(parsed, number, row)
            else:
                parsed.documents += 1
                parsed.bad.append((number, "not a string", f"the value of {missing!r} is not a string but null"))


def _add(parsed: Parsed, number: int, values: Sequence[bytes]) -> None:
    """Add a document with the raw texts `values`, one per key, unless one of them is bad."""
    parsed.documents += 1
    try:
        texts = [decode_line(value) for value in values]
    except BadLine as reason:
        parsed.bad.append((number, reason.kind, str(reason)))
        return
    for column, text in zip(parsed.texts, texts, strict=True):
        column.append(text)


def _lines(data: bytes) -> list[bytes]:
    """Lines without their line feeds. An empty rest after the last line feed is not a line."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def sample_texts(files: Sequence[str], forms: Sequence[Form], keys: Sequence[str], largest: int) -> list[str]:
    """Different texts from all parts of the input, about _SAMPLE_CHARACTERS in all. Long texts are cut; pipes give none.

    largest: bytes that a document may have.
    """
    parse, texts = Parser(keys), []
    for chunk in sample_chunks(files, forms, keys, 16, 16 if len(files) == 1 else 2, _SAMPLE_CHUNK, largest):
        for column in parse(chunk.form, chunk.read()).texts:
            texts += [text[:_SAMPLE_CHUNK] for text in column]
    texts = list(dict.fromkeys(texts))  # the chunks of a small file overlap
    return texts[:: max(sum(map(len, texts)) // _SAMPLE_CHARACTERS, 1)]
