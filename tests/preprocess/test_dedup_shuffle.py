"""Repetitions are left out and documents shuffled. Oracle: a dictionary and a list in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.order import permute
from megatron_salt.preprocess import dedup_shuffle as module
from megatron_salt.preprocess import indexed_writer
from megatron_salt.preprocess.dedup_shuffle import arrange, repeated
from megatron_salt.preprocess.indexed_writer import IndexedWriter


def written(folder: Path, documents: list[np.ndarray], digests: np.ndarray) -> IndexedWriter:
    writer = IndexedWriter(str(folder / "source"), np.dtype(np.uint16), digests=True)
    for first in range(0, len(documents), 7):
        some = documents[first : first + 7]
        writer.append(np.concatenate(some), np.array(list(map(len, some)), np.int32), digests[first : first + 7])
    writer.mark()
    return writer


def corpus(number: int, different: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Documents and hashes. Equal documents have equal hashes; some different ones share half of a hash."""
    random = np.random.default_rng(number)
    kinds = random.integers(0, different, number)
    texts = [random.integers(0, 65535, int(size)).astype(np.uint16) for size in random.integers(1, 60, different)]
    hashes = random.integers(0, 1 << 64, (different, 2), np.uint64)
    hashes[: different // 3, 0] = hashes[0, 0]
    hashes[different // 2 :, 1] = 5
    hashes[-1] = (1 << 64) - 1
    return [texts[kind] for kind in kinds], hashes[kinds]


@pytest.mark.parametrize("budget", [1000, 20_000, 1 << 30])
@pytest.mark.parametrize("number, different", [(1, 1), (8, 8), (300, 40), (1001, 900)])
@pytest.mark.parametrize("dedup, seed", [(True, None), (False, 3), (True, 4)])
def test_documents_are_those_of_a_list(tmp_path, monkeypatch, budget, number, different, dedup, seed):
    monkeypatch.setattr(indexed_writer, "_CHUNK", 64)
    monkeypatch.setattr(module, "_CHUNK", 50)
    documents, digests = corpus(number, different)
    source = written(tmp_path, documents, digests)
    expected = list(documents)
    left_out = None
    if dedup:
        left_out = repeated(tmp_path / "source.digests", number, budget)
        first = {}
        for i, digest in enumerate(map(tuple, digests.tolist())):
            first.setdefault(digest, i)
        expected = [documents[i] for i in sorted(first.values())]
    if seed is not None:
        places = permute(np.arange(len(expected)), len(expected), seed).tolist()
        shuffled = dict(zip(places, expected, strict=True))
        expected = [shuffled[i] for i in range(len(expected))]
    target = IndexedWriter(str(tmp_path / "target"), source.dtype)
    arrange(source, target, tmp_path / "scratch", left_out, seed, budget)
    target.finish()
    assert np.array_equal(np.fromfile(tmp_path / "target.bin", np.uint16), np.concatenate(expected))
    lengths = np.fromfile(tmp_path / "target.idx", np.int32, len(expected), offset=34)
    assert lengths.tolist() == list(map(len, expected))
    assert not (tmp_path / "scratch").exists()


def test_a_seed_moves_documents():
    orders = {tuple(permute(np.arange(50), 50, seed).tolist()) for seed in range(20)}
    assert len(orders) == 20
