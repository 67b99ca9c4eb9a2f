"""The fast parser accepts what the standard library accepts, with the same texts, and refuses with the same reasons."""

from __future__ import annotations

import json
import random

import pytest

from megatron_salt.preprocess.inputs import BadLine, json_texts
from megatron_salt.preprocess.parse import Parser

ODD = [
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "x": NaN}',
    b'{"text": "a", "x": 1e999}',
    b'{"text": "a", "x": "\xff"}',
    b'{"text": "\\ud83d\\ude00"}',
    b'{"text": "\\ud83d"}',
    b'{"text": "a", "x": "\\ud800"}',
    b'{"x": {"text": "a"}}',
    b"null",
    b'{"text": "a"} ',
    b'{"text": "a"}x',
    b'{"te\\u0078t": "a"}',
    b'{"text": ["a"]}',
    b"\x0c",
    b'{"text": "a\x01"}',
    b"\xa0",
    b'{"text": "\\u0000\\"\\\\/\\b"}',
    b'{"text": "a", "n": 123456789012345678901234567890}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "' + "é\u2028\u0085🎉".encode() + b'"}',
    b"{" * 3000,
    b'{"text": "", "": 0}',
    b"\r",
    b'{"text": "a",}',
]


def slowly(data: bytes) -> tuple[list[str], list[tuple[int, str, str]], int]:
    texts, bad, documents = [], [], 0
    for number, line in enumerate(data.split(b"\n")):
        if line.strip():
            documents += 1
            try:
                texts += json_texts(line, ["text"])
            except BadLine as reason:
                bad.append((number, reason.kind, str(reason)))
    return texts, bad, documents


def fast(data: bytes) -> tuple[list[str], list[tuple[int, str, str]], int]:
    parsed = Parser(["text"])("jsonl", data)
    return parsed.texts[0], parsed.bad, parsed.documents


@pytest.mark.parametrize("line", ODD)
def test_odd_lines(line):
    assert fast(line) == slowly(line)
    assert fast(b'{"text": "x"}\n' + line + b'\n\n{"text": "y"}\n') == slowly(
        b'{"text": "x"}\n' + line + b'\n\n{"text": "y"}\n'
    )


def test_lines_with_random_damage():
    chance = random.Random(1)
    whole = [
        json.dumps({"id": i, "text": f'é "{i}" \\ \n', "meta": [1.5, None, {"a": "🎉"}]}, ensure_ascii=i % 2 == 0).encode()
        for i in range(4)
    ]
    for _ in range(3000):
        line = bytearray(chance.choice(whole))
        for _ in range(chance.choice([1, 1, 2])):
            at = chance.randrange(len(line))
            line[at : at + chance.choice([0, 1, 1, 3])] = chance.choice(
                [b"", b'"', b"\\", b"\xc3", b"{", b"0", b"\x00", b"}", b"u00", b","]
            )
        line = bytes(line).replace(b"\n", b" ")
        assert fast(line) == slowly(line), line
