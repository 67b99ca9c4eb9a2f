"""preprocess_data: the dataset does not depend on the form of the input; unusable input is refused by name, bad lines are counted."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_salt.data.manifest import read_manifest
from megatron_salt.tools import preprocess_data
from tests.support.datasets import (
    BYTES,
    ROOT,
    TEXTS,
    as_bytes,
    as_table,
    dataset,
    files_in,
    json_lines,
    run,
    write,
)


@pytest.fixture
def out(tmp_path) -> Path:
    """An output directory. It holds only what the tool leaves."""
    return tmp_path / "out"


def test_gzip_carriage_returns_byte_order_mark_and_blank_lines_are_read_as_meant(tmp_path, out):
    raw = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\\u2028\\r"}\r\n\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(raw))
    assert run(tmp_path / "x.jsonl.gz", out / "d") == 0
    assert dataset(out / "d") == as_bytes(["one", "two\u2028\r"])


FORMS = {
    "jsonl": lambda home: write(home / "x.jsonl", json_lines(TEXTS)),
    "no suffix": lambda home: write(home / "x", json_lines(TEXTS)),
    "gz": lambda home: write(home / "x.jsonl.gz", gzip.compress(json_lines(TEXTS))),
    "gz of several members": lambda home: write(
        home / "x.json.gz", gzip.compress(json_lines(TEXTS[:50])) + gzip.compress(json_lines(TEXTS[50:]))
    ),
    "zst": lambda home: write(home / "x.jsonl.zst", zstandard.compress(json_lines(TEXTS))),
    "zst of several frames": lambda home: write(
        home / "x.jsonl.zst", b"".join(zstandard.compress(json_lines([text])) for text in TEXTS)
    ),
    "parquet": lambda home: as_table(home / "x.parquet", {"n": list(range(120)), "text": TEXTS}),
    "parquet of several groups": lambda home: as_table(
        home / "x.parquet", {"text": TEXTS}, row_group_size=7, compression="zstd"
    ),
    "parquet of large strings": lambda home: as_table(
        home / "x.parquet", {"text": pyarrow.array(TEXTS, pyarrow.large_string())}
    ),
    "parquet of bytes": lambda home: as_table(home / "x.parquet", {"text": [text.encode() for text in TEXTS]}),
    "parquet of a dictionary": lambda home: as_table(home / "x.parquet", {"text": pyarrow.array(TEXTS).dictionary_encode()}),
}


@pytest.mark.parametrize("form, workers, chunk_bytes", [
    *((form, "1", chunk_bytes) for form in FORMS for chunk_bytes in (1 << 20, 300)),
    *((form, "2", 300) for form in ("jsonl", "zst", "parquet of several groups")),
])  # fmt: skip
def test_the_form_of_the_input_does_not_show(tmp_path, out, monkeypatch, form, workers, chunk_bytes):
    monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", chunk_bytes)
    assert run(FORMS[form](tmp_path), out / "d", "--workers", workers) == 0
    assert dataset(out / "d") == as_bytes(TEXTS)


@pytest.mark.parametrize("name, pack", [("x.txt", bytes), ("x.txt.gz", gzip.compress), ("x.txt.zst", zstandard.compress)])
@pytest.mark.parametrize("chunk_bytes", [5, 1 << 20])
def test_plain_text_is_a_document_a_line_or_a_file(tmp_path, out, monkeypatch, name, pack, chunk_bytes):
    monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", chunk_bytes)
    raw = "\ufeffone\r\n\n  two é\u2028\n \nthree".encode()
    assert run(write(tmp_path / name, pack(raw)), out / "d") == 0
    assert dataset(out / "d") == as_bytes(["one", "  two é\u2028", "three"])
    assert run(tmp_path / name, out / "e", "--text-documents", "file") == 0
    assert dataset(out / "e") == [list(raw[3:])]


@pytest.mark.parametrize(
    "flags, raw",
    [([], json_lines(TEXTS)), (["--input-format", "text"], "".join(text.replace("\n", " ") + "\n" for text in TEXTS).encode())],
)
def test_standard_input_is_read(out, flags, raw):
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        "-",
        "--output-prefix",
        str(out / "d"),
        *BYTES,
        "--workers",
        "2",
        *flags,
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, input=raw, check=True, timeout=60)
    assert dataset(out / "d") == as_bytes([text.replace("\n", " ") if flags else text for text in TEXTS])


def test_rows_without_a_value_are_bad_lines(tmp_path, out, capsys):
    table = as_table(tmp_path / "x.parquet", {"text": ["a", None, "b", ""], "title": ["c", "d", None, "e"]})
    assert run(table, out / "d", "--json-keys", "text", "title", "--max-bad-lines", "2") == 0
    assert dataset(out / "d", "text") == as_bytes(["a"]) and dataset(out / "d", "title") == as_bytes(["c", "e"])
    shown = capsys.readouterr().out
    assert "x.parquet:2: the value of 'text' is not a string but null" in shown and "x.parquet:3: the value of 'title'" in shown
    (source,) = read_manifest(f"{out}/d_text_document").sources
    assert (source.lines, source.documents, source.empty_documents, source.reasons) == (4, 1, 1, {"not a string": 2})


BAD_LINES = {
    "malformed": (b'{"text": "a', "malformed JSON"),
    "not an object": (b'["text"]', "not a JSON object but list"),
    "no key": (b'{"txt": "a"}', "no key 'text'"),
    "null": (b'{"text": null}', "not a string but NoneType"),
    "number": (b'{"text": 3}', "not a string but int"),
    "utf-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate"),
    "deep": (b"[" * 200_000, "malformed JSON"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "invalid UTF-8"),
    "number with 5000 digits": (b"9" * 5000, "malformed JSON"),
}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("kind", ["malformed", "utf-8"])
def test_a_bad_line_ends_the_run_by_file_and_number_and_leaves_nothing(tmp_path, out, capsys, kind, workers):
    line, reason = BAD_LINES[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    assert run(path, out / "d", "--workers", workers) == 2
    message = capsys.readouterr().err
    assert f"{path}:3: {reason}" in message and "--max-bad-lines" in message and "Traceback" not in message
    assert not files_in(out)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_up_to_the_limit_are_left_out_shown_and_counted(tmp_path, out, capsys, kind):
    line, reason = BAD_LINES[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line.replace(b"\n", b" ") + b'\n{"text": "two"}\n')
    assert run(path, out / "d", "--max-bad-lines", "1") == 0
    shown = capsys.readouterr().out
    assert f"bad line {path}:2: " in shown and reason in shown
    assert dataset(out / "d") == as_bytes(["one", "two"])
    assert read_manifest(f"{out}/d_text_document").sources[0].rejected_lines == 1


def test_only_the_first_few_bad_lines_are_shown(tmp_path, out, capsys):
    (tmp_path / "x.jsonl").write_text("no\n" * 500 + '{"text": "a"}\n')
    assert run(tmp_path / "x.jsonl", out / "d", "--max-bad-lines", "500") == 0
    shown = capsys.readouterr().out
    assert shown.count("bad line ") == 10 and "500 bad lines" in shown
    assert run(tmp_path / "x.jsonl", out / "e", "--max-bad-lines", "499") == 2
    assert "--max-bad-lines allows 499" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda home: home / "missing.jsonl", "missing.jsonl: no such file"),
        (lambda home: home / "*.nothing", "no such file"),
        (lambda home: home, "is a directory"),
        (lambda home: write(home / "x.jsonl", b""), "no document"),
        (lambda home: write(home / "x.jsonl", b"\n\n"), "no document"),
        (lambda home: write(home / "x.jsonl", b'{"text": ""}\n'), "no document under the key 'text'"),
        (lambda home: write(home / "x.jsonl.gz", gzip.compress(os.urandom(9000))[:4000]), "x.jsonl.gz is damaged or truncated"),
        (lambda home: write(home / "x.jsonl.gz", b"not gzip"), "x.jsonl.gz is damaged"),
        (lambda home: write(home / "x.jsonl.zst", b"x"), "x.jsonl.zst is damaged or truncated"),
        (
            lambda home: write(home / "x.jsonl.zst", zstandard.compress(os.urandom(9000))[:4000]),
            "x.jsonl.zst is damaged or truncated",
        ),
        (lambda home: write(home / "x.jsonl.xz", b"x"), ".xz files cannot be read"),
        (lambda home: write(home / "x.parquet", b"x" * 100), "x.parquet is damaged or truncated"),
        (lambda home: as_table(home / "x.parquet", {"txt": ["a"]}), "no column 'text'.*it has txt"),
        (lambda home: as_table(home / "x.parquet", {"text": [1]}), "does not hold strings but int64"),
        (lambda home: [write(home / "x.jsonl", b'{"text": "a"}'), home / "x.*"], "names .*x.jsonl twice"),
    ],
)
def test_unusable_input_is_refused_by_name_and_leaves_nothing(tmp_path, out, capsys, make, word):
    home = tmp_path / "in"
    home.mkdir()
    assert run(make(home), out / "d") == 2
    message = capsys.readouterr().err
    assert re.search(word, message) and "--input" in message and not files_in(out)
