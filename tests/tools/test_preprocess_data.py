"""preprocess_data: Megatron's files, the same for any number of workers; bad input is refused by name and leaves nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
import zstandard

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: its imports expect a GPU)

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_salt.cli import run_tool
from megatron_salt.data.manifest import fingerprint, read_manifest, tokenizer_directory
from megatron_salt.tokenizer.tokenizer import load_tokenizer
from megatron_salt.tools import preprocess_data
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "the quick brown fox, ça et là 日本 🎉\n" * (i % 7 + 1) for i in range(120)]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = [json.dumps({key: text, "other": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_table(path: Path, columns: dict, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def run(inputs: Path | list[Path], prefix: Path, *flags: str, tokenizer: list[str] = BYTES) -> int:
    """The tool's exit status."""
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    return run_tool(PreprocessConfig, preprocess, ["--input", *names, "--output-prefix", str(prefix), *tokenizer, *flags])


def dataset(prefix: Path, key: str = "text") -> list[list[int]]:
    """The documents as mcore reads them."""
    return [document.tolist() for document in IndexedDataset(f"{prefix}_{key}_document")]


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def out(tmp_path) -> Path:
    """A directory that holds nothing but what the tool leaves."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def sentencepiece_flags(tmp_path_factory) -> list[str]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    path = tmp_path_factory.mktemp("model") / "sp.model"
    path.write_bytes(model.getvalue())
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]


@pytest.mark.parametrize("append_eod", [False, True])
def test_the_files_are_those_that_mcores_builder_makes_of_the_same_ids(corpus, out, sentencepiece_flags, append_eod):
    assert run(corpus, out / "d", *["--append-eod"] * append_eod, tokenizer=sentencepiece_flags) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_flags[-1])
    builder = IndexedDatasetBuilder(str(out / "m.bin"), dtype=DType.optimal_dtype(processor.vocab_size()))
    for text in TEXTS:
        ids = processor.encode(text) + [processor.eos_id()] * append_eod
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(out / "m.idx"))
    for suffix in ("bin", "idx"):
        assert (out / f"d_text_document.{suffix}").read_bytes() == (out / f"m.{suffix}").read_bytes()


def test_any_number_of_workers_writes_the_same_files(tmp_path, corpus, monkeypatch, sentencepiece_flags):
    monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", 1000)
    more = write_lines(tmp_path / "more.jsonl", TEXTS[::-1])
    for workers in (1, 2, 3):
        flags = ["--append-eod", "--workers", str(workers)]
        assert run([corpus, more], tmp_path / f"w{workers}" / "d", *flags, tokenizer=sentencepiece_flags) == 0
    first = files_in(tmp_path / "w1")
    assert {"d_text_document.bin", "d_text_document.idx", "d_text_document.manifest.json"} < set(first)
    assert files_in(tmp_path / "w2") == first == files_in(tmp_path / "w3")


def test_the_backend_shows_in_the_manifest_alone(tmp_path, corpus, sentencepiece_flags, capsys):
    files = {}
    for backend in ("auto", "reference", "gigatoken"):
        assert run(corpus, tmp_path / backend / "d", "--tokenizer-backend", backend, tokenizer=sentencepiece_flags) == 0
        assert ("gigatoken, which gave the ids" in capsys.readouterr().out) == (backend != "reference")
        files[backend] = files_in(tmp_path / backend)
        manifest = json.loads(files[backend].pop("d_text_document.manifest.json"))
        assert manifest["tokenizer_backends"] == ["reference" if backend == "reference" else "gigatoken"]
    assert files["auto"] == files["reference"] == files["gigatoken"]


def test_the_size_of_batches_does_not_show(tmp_path, corpus, monkeypatch):
    for size in (1, 777, 1 << 20):
        monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", size)
        assert run(corpus, tmp_path / str(size) / "d") == 0
    assert files_in(tmp_path / "1") == files_in(tmp_path / "777") == files_in(tmp_path / str(1 << 20))


def test_files_come_in_the_order_given_and_patterns_sorted(tmp_path, out):
    for name in ("b1", "b0", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", [name])
    assert run([tmp_path / "c.jsonl", tmp_path / "b*.jsonl", tmp_path / "a.jsonl"], out / "d") == 0
    assert dataset(out / "d") == as_bytes(["c", "b0", "b1", "a"])


def test_each_key_gets_a_dataset(tmp_path, out):
    rows = [{"title": f"title {i}", "body": f"body {i}", "n": i} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))  # no line feed at the end
    assert run(tmp_path / "x.jsonl", out / "d", "--json-keys", "body", "title") == 0
    for key in ("title", "body"):
        assert dataset(out / "d", key) == as_bytes([str(row[key]) for row in rows])
        assert read_manifest(f"{out}/d_{key}_document").json_key == key


def test_gzip_carriage_returns_byte_order_mark_and_blank_lines_are_read_as_meant(tmp_path, out):
    raw = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\\u2028\\r"}\r\n\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(raw))
    assert run(tmp_path / "x.jsonl.gz", out / "d") == 0
    assert dataset(out / "d") == as_bytes(["one", "two\u2028\r"])


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


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


def test_equal_documents_are_written_once_and_counted(tmp_path, out, capsys):
    texts = ["a", "b", "", "a", "c", "b ", "a", "c"]
    assert run(write_lines(tmp_path / "x.jsonl", texts), out / "d", "--dedup", "exact", "--append-eod") == 0
    assert (
        dataset(out / "d") == [[97, 256], [98, 256], [99, 256], [98, 32, 256]]
        and "3 duplicates left out" in capsys.readouterr().out
    )
    manifest = read_manifest(f"{out}/d_text_document")
    assert (manifest.documents, manifest.duplicates, manifest.sources[0].documents) == (4, 3, 7)
    assert fingerprint(f"{out}/d_text_document", verify=True) == manifest.fingerprint


def test_documents_are_shuffled_by_the_seed_alone(tmp_path, corpus, out, monkeypatch):
    assert run(corpus, out / "a", "--shuffle-documents", "1") == 0
    monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", 900)
    monkeypatch.setattr(preprocess_data, "ARRANGE_BYTES", 3000)
    assert run(corpus, out / "b", "--shuffle-documents", "1", "--workers", "2") == 0
    assert run(corpus, out / "c", "--shuffle-documents", "2") == 0
    a, b, c = (dataset(out / name) for name in "abc")
    assert a == b and a != c and sorted(a) == sorted(c) == sorted(as_bytes(TEXTS)) and a != as_bytes(TEXTS)
    assert not any(".tmp" in name for name in files_in(out))
    assert read_manifest(f"{out}/a_text_document").shuffle_seed == 1


def test_very_long_documents_and_all_of_unicode_survive(tmp_path, out):
    texts = ["x" * 10_000_000, "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 17)])), "\x00"]
    assert run(write_lines(tmp_path / "x.jsonl", texts), out / "d") == 0
    assert [bytes(ids).decode() for ids in dataset(out / "d")] == texts


def test_empty_documents_are_left_out_and_counted_without_an_eod_of_their_own(tmp_path, out):
    assert run(write_lines(tmp_path / "x.jsonl", ["a", "", "b", ""]), out / "d", "--append-eod") == 0
    assert dataset(out / "d") == [[97, 256], [98, 256]]
    (source,) = read_manifest(f"{out}/d_text_document").sources
    assert (source.lines, source.documents, source.empty_documents, source.rejected_lines) == (4, 2, 2, 0)


@pytest.mark.parametrize("words, dtype", [(65499, np.uint16), (65500, np.int32)])
def test_large_vocabularies_are_stored_in_int32(tmp_path, out, words, dtype):
    vocabulary = {f"w{i}": i for i in range(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "t.json"))
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "t.json")]
    assert run(write_lines(tmp_path / "x.jsonl", [f"w5 w{words - 1}"]), out / "d", tokenizer=flags) == 0
    assert IndexedDataset(str(out / "d_text_document"))[0].dtype == dtype and dataset(out / "d") == [[5, words - 1]]


def test_the_manifest_tells_what_was_made_of_what(tmp_path, corpus, out):
    more = write_lines(tmp_path / "more.jsonl", ["a", "b"])
    assert run([corpus, more], out / "d", "--append-eod") == 0
    prefix = f"{out}/d_text_document"
    manifest, tokenizer = read_manifest(prefix), load_tokenizer(tokenizer_directory(prefix))
    documents = dataset(out / "d")
    assert (manifest.documents, manifest.tokens, manifest.dtype) == (122, sum(map(len, documents)), "uint16")
    assert (manifest.tokenizer_type, manifest.tokenizer_fingerprint) == ("ByteLevelTokenizer", tokenizer.fingerprint)
    assert (manifest.vocab_size, manifest.eod, manifest.append_eod) == (257, 256, True)
    assert [(s.file, s.size_bytes, s.lines, s.documents) for s in manifest.sources] == [
        (str(corpus), corpus.stat().st_size, 120, 120),
        (str(more), more.stat().st_size, 2, 2),
    ]
    assert [s.text_bytes for s in manifest.sources] == [sum(map(len, as_bytes(TEXTS))), 2]
    assert fingerprint(prefix) == fingerprint(prefix, verify=True) == manifest.fingerprint


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


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--workers", "0"], "--workers"),
        (["--max-bad-lines", "-1"], "--max-bad-lines"),
        (["--max-memory", "0.1", "--workers", "3"], "--max-memory 0.1 GiB is too little for --workers 3"),
        (["--resume", "--overwrite"], "--resume"),
        (["--shard", "2/2"], "--shard"),
        (["--shard", "0/2", "--dedup", "exact"], "--dedup"),
        (["--shuffle-documents", "-1"], "--shuffle-documents"),
        (["--input-format", "xml"], "--input-format"),
        (["--log-interval", "0"], "--log-interval"),
        (["--json-keys", "a", "a"], "--json-keys"),
        (["--json-keys", "a/b"], "--json-keys"),
        (["--tokenizer-model", "x"], "--tokenizer-model x"),
        (["--aplend-eod"], "did you mean --append-eod"),
    ],
)
def test_wrong_flags_are_refused_by_name(corpus, out, capsys, flags, word):
    assert run(corpus, out / "d", *flags) == 2
    assert word in capsys.readouterr().err and not files_in(out)


def test_append_eod_needs_a_tokenizer_that_has_one(tmp_path, corpus, out, capsys):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "t.json")]
    assert run(corpus, out / "d", "--append-eod", tokenizer=flags) == 2
    assert "--append-eod" in capsys.readouterr().err and not files_in(out)


def test_what_exists_is_kept_without_overwrite_and_replaced_whole_with_it(tmp_path, corpus, out, capsys):
    assert run(corpus, out / "d") == 0
    before = files_in(out)
    other = write_lines(tmp_path / "other.jsonl", ["other"])
    assert run(other, out / "d") == 2
    assert "--overwrite" in capsys.readouterr().err and files_in(out) == before
    bad = write(tmp_path / "bad.jsonl", b'{"text": "a"}\nbad\n')
    assert run(bad, out / "d", "--overwrite") == 2 and files_in(out) == before
    assert run(other, out / "d", "--overwrite") == 0
    assert dataset(out / "d") == as_bytes(["other"]) and set(files_in(out)) == set(before)


def tool(*flags: str, limit_blocks: int | None = None, stderr: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """The tool as a user starts it, from the repository's root; `limit_blocks` KiB a file stand for a full disk."""
    command = [sys.executable, "tools/preprocess_data.py", *flags]
    if limit_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_blocks}; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_a_full_disk_is_an_error_that_leaves_nothing(corpus, out):
    process = tool("--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, limit_blocks=8)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and "--output-prefix" in message and "Traceback" not in message and not files_in(out)


def test_after_a_full_disk_a_run_resumes(tmp_path, corpus, out):
    flags = ["--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, "--resume"]
    assert tool(*flags, limit_blocks=8).wait(timeout=60) == 2 and files_in(out)
    assert tool(*flags).wait(timeout=60) == 0 and run(corpus, tmp_path / "whole/d") == 0
    assert files_in(out) == files_in(tmp_path / "whole")


def test_a_terminal_sees_a_bar(corpus, out):
    parent, child = os.openpty()
    assert tool("--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, stderr=child).wait(timeout=60) == 0
    os.close(child)
    shown = ""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(parent, 10_000):
            shown += part.decode()
    os.close(parent)
    assert "100%" in shown and "MB/s" in shown and "documents/s" in shown and "tokens/s" in shown and "left" in shown


def test_an_unwritable_place_is_refused_by_name(tmp_path, corpus, capsys):
    assert run(corpus, write(tmp_path / "file", b"") / "d") == 2
    assert "--output-prefix" in capsys.readouterr().err


TOLD_RUN = """
import resource, sys
from megatron_salt.tools import preprocess_data
code = preprocess_data.run_tool(preprocess_data.PreprocessConfig, preprocess_data.preprocess, sys.argv[1:])
own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
print("memory", own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A process's ru_maxrss would begin with that of the one that started it, which here holds the texts: VmHWM is its own."""


@pytest.mark.long
@pytest.mark.parametrize(
    "suffix, flags",
    [("jsonl", []), ("jsonl.zst", []), ("parquet", []), ("jsonl", ["--dedup", "exact", "--shuffle-documents", "1"])],
)
def test_ten_times_the_input_takes_no_more_memory(tmp_path, suffix, flags):
    """Of short documents, of which the index has most to say. KiB, of the parent and of its largest child. What puts documents
    in order takes what --max-memory leaves, and no more."""
    peaks = []
    for number in (60_000, 600_000):
        texts = [f"{i} document" for i in range(number)]
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "parquet":
            as_table(path, {"text": texts}, row_group_size=30_000)
        else:
            path.write_bytes(json_lines(texts) if suffix == "jsonl" else zstandard.compress(json_lines(texts)))
        command = [
            sys.executable,
            "-c",
            TOLD_RUN,
            "--input",
            str(path),
            "--output-prefix",
            str(tmp_path / f"{number}/d"),
            *BYTES,
            "--workers",
            "2",
            "--max-memory",
            "0.6",
            *flags,
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=60,
        )
        peaks.append([int(word) for word in done.stdout.split("memory")[1].split()])
    assert peaks[1][0] + 2 * peaks[1][1] < 0.6 * 2**20, peaks
    if not flags:
        assert max(late - early for early, late in zip(*peaks, strict=True)) < 25_000, peaks


class Interrupted:
    """The tool with two workers in the middle of its input, a pipe that this object holds open."""

    def __init__(self, home: Path, out: Path) -> None:
        os.mkfifo(home / "pipe")
        self.stderr = home / "stderr"  # a file: a pipe would stay open as long as a worker lives
        with open(self.stderr, "w") as stderr:
            self.process = tool(
                "--input",
                str(home / "pipe"),
                "--output-prefix",
                str(out / "d"),
                *BYTES,
                "--workers",
                "2",
                "--log-interval",
                "1",
                stderr=stderr,
            )
        self.deadline = threading.Timer(60, self.process.kill)
        self.deadline.start()
        self.pipe = open(home / "pipe", "w")  # noqa: SIM115 (closed by close)
        self.feed()
        assert self.process.stdout is not None and any(" documents, " in line for line in self.process.stdout)
        assert (out / "d_text_document.tmp.bin").exists()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(self.workers) == 2

    def feed(self) -> None:
        for _ in range(20):
            self.pipe.write(json.dumps({"text": "x" * 1_000_000}) + "\n")
            self.pipe.flush()

    def close(self) -> str:
        """What the tool wrote to stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.close()
        self.process.wait()
        self.deadline.cancel()
        return self.stderr.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
def test_kill_9_leaves_no_dataset_and_no_worker_and_the_next_run_is_whole(tmp_path, out):
    run_in_progress = Interrupted(tmp_path, out)
    run_in_progress.process.kill()
    run_in_progress.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, run_in_progress.workers)):
        assert time.monotonic() < deadline, "workers outlive the killed run"
        time.sleep(0.05)
    assert all(".tmp." in name for name in files_in(out))
    assert run(write_lines(tmp_path / "x.jsonl", ["a"]), out / "d") == 0
    assert dataset(out / "d") == as_bytes(["a"]) and not any(".tmp" in name for name in files_in(out))


def test_what_a_killed_run_left_does_not_get_into_the_next_dataset(tmp_path, corpus, out):
    assert run(corpus, out / "clean") == 0
    stale = out / "d_text_document.tmp.tokenizer"
    stale.mkdir()
    (stale / "tokenizer.model").write_bytes(b"of another tokenizer")
    assert run(corpus, out / "d") == 0
    assert {name.replace("d_", "clean_", 1): content for name, content in files_in(out).items() if name.startswith("d_")} == {
        name: content for name, content in files_in(out).items() if name.startswith("clean_")
    }


@pytest.mark.long
def test_a_worker_that_dies_ends_the_run_with_a_message(tmp_path, out):
    run_in_progress = Interrupted(tmp_path, out)
    os.kill(run_in_progress.workers[0], 9)
    with contextlib.suppress(BrokenPipeError):
        run_in_progress.feed()
    message = run_in_progress.close()
    assert run_in_progress.process.returncode == 2 and "--workers 2" in message and "Traceback" not in message
    assert not files_in(out)
