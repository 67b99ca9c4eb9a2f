"""The writer's oracle is mcore's IndexedDatasetBuilder, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: its imports expect a GPU)

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_salt.preprocess import indexed_writer
from megatron_salt.preprocess.indexed_writer import IndexedWriter, token_dtype


def documents_of(dtype: type, count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [
        generator.integers(0, np.iinfo(np.uint16).max, size, endpoint=True).astype(dtype)
        for size in generator.integers(1, 50, count)
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("num_documents, chunk", [(1, 1 << 20), (6, 3), (7, 3), (100, 1 << 20), (100, 1)])
def test_the_files_are_those_of_mcores_builder(tmp_path, monkeypatch, dtype, num_documents, chunk):
    monkeypatch.setattr(indexed_writer, "_CHUNK", chunk)
    documents = documents_of(dtype, num_documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    writer = IndexedWriter(str(tmp_path / "ours"), np.dtype(dtype))
    for batch in (documents[:4], [], documents[4:]):
        writer.append(np.concatenate([np.empty(0, dtype), *batch]), np.array([len(d) for d in batch], np.int32))
    written = writer.finish()

    ours = {suffix: (tmp_path / f"ours.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    assert ours == {suffix: (tmp_path / f"theirs.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    hashes = {suffix: hashlib.blake2b(content, digest_size=32).hexdigest() for suffix, content in ours.items()}
    assert {"bin": written.bin_hash, "idx": written.idx_hash} == hashes
    assert (written.bin_bytes, written.idx_bytes) == (len(ours["bin"]), len(ours["idx"]))
    assert (written.documents, written.tokens) == (num_documents, sum(map(len, documents)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]
    for ours_read, document in zip(IndexedDataset(str(tmp_path / "ours")), documents, strict=True):
        assert np.array_equal(ours_read, document)


@pytest.mark.parametrize("vocabulary_size", [1, 256, 65499, 65500, 65536, 256000])
def test_ids_are_stored_in_megatrons_type(vocabulary_size):
    assert token_dtype(vocabulary_size) == DType.optimal_dtype(vocabulary_size)


def test_discard_leaves_nothing(tmp_path: Path):
    writer = IndexedWriter(str(tmp_path / "a"), np.dtype(np.uint16))
    writer.append(np.ones(3, np.uint16), np.array([3], np.int32))
    writer.discard()
    assert not list(tmp_path.iterdir())
