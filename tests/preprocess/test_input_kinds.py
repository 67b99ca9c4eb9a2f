"""Kinds of input: text columns, names in any case, encodings and line ends that errors name, documents of any size."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

from megatron_salt.cli import run_tool
from megatron_salt.data.manifest import read_manifest
from megatron_salt.errors import UserError
from megatron_salt.preprocess import encode, parquet, readers
from megatron_salt.preprocess.readers import Form
from megatron_salt.tokenizer.tokenizer import tokenizer_from_files
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from megatron_salt.tools.train_tokenizer import TrainTokenizerConfig, train_tokenizer

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def tokenise(prefix: Path, *words: object) -> int:
    return run_tool(
        PreprocessConfig,
        preprocess,
        ["--input", *map(str, words), "--output-prefix", str(prefix), "--tokenizer-type", "ByteLevelTokenizer"],
    )


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
def test_every_string_like_column_packs_to_the_same_texts(kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["a", None, "a text longer than the twelve bytes that a view holds itself", ""]
    values = texts if "string" in kind else [text if text is None else text.encode() for text in texts]
    batch = pyarrow.record_batch({"text": pyarrow.array(values, getattr(pyarrow, kind)())})
    parquet._check_columns("t.parquet", batch.schema, ["text"])
    assert parquet.unpack(parquet._packed(batch, ["text"]), 1) == [[t if t is None else t.encode() for t in texts]]


def test_columns_of_dictionaries_are_texts() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.string(), pyarrow.large_string()):
        texts = ["a", "b", None, "a"]
        batch = pyarrow.record_batch({"text": pyarrow.array(texts, kind).dictionary_encode()}).slice(1)
        parquet._check_columns("t.parquet", batch.schema, ["text"])
        assert parquet.unpack(parquet._packed(batch, ["text"]), 1) == [[b"b", None, b"a"]]


@pytest.mark.parametrize("name, packed", [("A.JSONL.GZ", gzip.compress), ("a.jsonl.Zst", zstandard.compress), ("a.TXT", bytes)])
def test_a_name_says_the_same_in_upper_case(tmp_path, name, packed: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(packed(LINES))
    assert readers.form_of(name, "line") == ("text" if "TXT" in name else "jsonl")
    assert tokenise(tmp_path / "d", tmp_path / name) == 0
    assert read_manifest(f"{tmp_path}/d_text_document").tokens == (26 if "TXT" in name else 2)
    words = ["--input", str(tmp_path / name), "--output", str(tmp_path / "m"), "--vocab-size", "400"]
    assert run_tool(TrainTokenizerConfig, train_tokenizer, words) == 2  # so little text has no such vocabulary; but it was read


def test_an_upper_case_suffix_that_cannot_be_read_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl.XZ").write_bytes(b"x")
    assert tokenise(tmp_path / "d", tmp_path / "a.jsonl.XZ") == 2
    assert ".XZ files cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "coding, told",
    [
        ("utf-16", "UTF-16; convert it with iconv -f UTF-16 -t UTF-8"),
        ("utf-16-be", "UTF-16; convert"),
        ("utf-32", "UTF-32; convert it with iconv -f UTF-32 -t UTF-8"),
    ],
)
def test_other_encodings_are_told_by_name(tmp_path, capsys, packed, coding, told) -> None:
    path = tmp_path / ("a.jsonl" if packed is bytes else "a.jsonl.gz")
    path.write_bytes(packed((("\ufeff" if coding.endswith("be") else "") + LINES.decode()).encode(coding)))
    assert tokenise(tmp_path / "out" / "d", path, "--max-bad-lines", "9") == 2
    assert f"--input {path} is {told}" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_carriage_returns_alone_end_no_line(tmp_path, capsys) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(LINES.replace(b"\n", b"\r"))
        assert tokenise(tmp_path / "d", tmp_path / name, "--max-bad-lines", "9") == 2
        assert f"{name} ends its lines with carriage returns alone; convert it with tr" in capsys.readouterr().err
    for number, content in enumerate([LINES.replace(b"\n", b"\r\n"), b'{"text": "a"}\r', b'{"text": "a"}']):
        (tmp_path / f"{number}.jsonl").write_bytes(content)
        assert tokenise(tmp_path / f"{number}", tmp_path / f"{number}.jsonl") == 0
    assert tokenise(tmp_path / "whole", tmp_path / "a.txt", "--text-documents", "file") == 0


def pieces(path: Path, form: Form, largest: int, chunk_bytes: int = 100) -> list[int]:
    return [len(chunk.read()) for chunk in readers.chunks(0, str(path), form, ["text"], 0, chunk_bytes, largest)]


@pytest.mark.parametrize("name, form", [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.txt", "file"), ("a.txt.gz", "file")])
def test_a_document_that_is_too_large_is_refused_before_it_is_in_memory(tmp_path, name, form) -> None:
    line = json.dumps({"text": "x" * 5000}).encode() + b"\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    assert sum(pieces(path, form, 6000)) == len(line)
    with pytest.raises(UserError, match=f"--input {path}: a document at byte .* more than 4000 bytes; .*--max-document-mib"):
        pieces(path, form, 4000)


def test_a_line_of_gigabytes_costs_no_memory(tmp_path, capsys) -> None:
    import resource

    with open(tmp_path / "a.jsonl", "wb") as stream:
        stream.write(LINES)
        stream.truncate(8 << 30)  # a hole: one line without an end
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert tokenise(tmp_path / "d", tmp_path / "a.jsonl", "--max-document-mib", "16") == 2
    assert "has more than 16777216 bytes" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_large_row_of_a_table_is_refused(tmp_path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "x" * 5000]}), path)
    assert sum(pieces(path, "columns", 5000)) > 5000
    with pytest.raises(UserError, match=f"--input {path}: a document at a row from . on has more than 4000 bytes"):
        pieces(path, "columns", 4000)


def test_a_document_of_more_tokens_than_the_index_can_count_is_refused(monkeypatch) -> None:
    encoder = encode.Encoder(
        tokenizer_from_files("ByteLevelTokenizer", {}, "test"),
        encode.EncoderSettings(backend="reference", keys=("text",), append_eod=False),
    )
    monkeypatch.setattr(encoder, "_encode", lambda texts: (np.empty(0, np.int32), np.array([1 << 31], np.int64)))
    with pytest.raises(
        UserError, match="--input a.jsonl: a document from 0 on has 2147483648 tokens, more than the 2147483646"
    ):
        encoder.encode(
            readers.Chunk(file=0, path="a.jsonl", form="jsonl", start=0, end=14, on_disk=14, data=b'{"text": "a"}\n')
        )


@pytest.mark.parametrize(
    "kind, name", [("SentencePieceTokenizer", "tokenizer.model"), ("HuggingFaceTokenizer", "tokenizer.json")]
)
def test_a_tiktoken_vocabulary_is_refused_with_the_way_out(kind, name) -> None:
    content = b"".join(base64.b64encode(bytes([number])) + b" %d\n" % number for number in range(256))
    with pytest.raises(
        UserError, match="--tokenizer-model x is a tiktoken vocabulary, .*--tokenizer-type HuggingFaceTokenizer"
    ):
        tokenizer_from_files(kind, {name: content}, "--tokenizer-model x")


def test_a_sentencepiece_model_is_none() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a text to train on"] * 9), model_writer=model, vocab_size=20, model_type="char", minloglevel=2
    )
    assert tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": model.getvalue()}, "x").vocabulary_size > 9


def test_a_link_to_nothing_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    words = [
        "--input",
        str(tmp_path / "*.jsonl"),
        "--output-prefix",
        str(tmp_path / "d"),
        "--tokenizer-type",
        "ByteLevelTokenizer",
    ]
    assert run_tool(PreprocessConfig, preprocess, [*words, "--shard", "0/1"]) == 2
    assert "a.jsonl is a link to" in capsys.readouterr().err
