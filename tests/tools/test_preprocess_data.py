"""preprocess_data: Megatron's files, the same for any number of workers, with a manifest; wrong flags are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: its imports expect a GPU)

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_salt.data.manifest import fingerprint, read_manifest, tokenizer_directory
from megatron_salt.tokenizer.tokenizer import load_tokenizer
from megatron_salt.tools import preprocess_data
from tests.support.datasets import (
    TEXTS,
    as_bytes,
    dataset,
    files_in,
    run,
    write,
    write_lines,
)


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
