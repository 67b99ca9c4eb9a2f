"""Shards are read as one index, in any order of samples, and merged; what is not whole is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.selection import score_reader
from megatron_salt.selection.score_format import (
    claim,
    columns,
    shard_blocks,
    shard_paths,
)
from megatron_salt.selection.score_reader import ScoreIndex, merge
from megatron_salt.selection.score_writer import ShardWriter
from tests.support.selections import MANIFEST, ROWS, manifest_of, write_index, write_shard


def opened(*directories: Path) -> ScoreIndex:
    return ScoreIndex.open([str(directory) for directory in directories])


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 50, 103, 1000])
def test_chunks_are_the_column_in_order(tmp_path: Path, size: int) -> None:
    index = write_index(tmp_path, MANIFEST, ROWS, 3)
    for first, end in ((0, None), (0, 103), (5, 88), (32, 33), (40, 40)):
        starts, values = [], []
        for start, chunk in index.chunks("median", first, end, size):
            starts.append(start)
            values.append(chunk)
        stop = 103 if end is None else end
        assert starts == list(range(first, stop, size))
        assert np.array_equal(np.concatenate([*values, np.zeros(0, np.float32)]), ROWS["median"][first:stop])


@pytest.mark.parametrize("chunk", [1, 10, 1 << 20])
def test_rows_are_what_was_asked_for_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(score_reader, "CHUNK", chunk)
    index = write_index(tmp_path, MANIFEST, ROWS, 3)
    for ids in (
        np.random.default_rng(0).integers(0, 103, 300),
        np.array([102, 0]),
        np.array([], np.int64),
        np.array([7], np.uint32),
    ):
        rows = index.rows(ids, ["median", "tokens", "content"])
        assert all(
            np.array_equal(values, ROWS[name][ids]) and values.dtype == ROWS[name].dtype for name, values in rows.items()
        )


def test_opening_costs_the_same_at_any_number_of_samples(tmp_path: Path) -> None:
    manifest = manifest_of([10**12], block_samples=10**11)
    claim(tmp_path, manifest)
    kinds = columns(manifest.top_k, manifest.seq_length)
    for number in range(10):
        shard = ShardWriter(tmp_path, manifest, range(number, number + 1))  # files with holes
        files = {name: {"bytes": (shard.path / f"{name}.npy").stat().st_size, "hash": ""} for name in kinds}
        facts = {
            "format": 1,
            "index": manifest.fingerprint,
            "first": number * 10**11,
            "end": (number + 1) * 10**11,
            "columns": files,
        }
        (shard.path / "shard.json").write_text(json.dumps(facts))
        shard.close()
    started = time.monotonic()
    index = opened(tmp_path)
    assert index.num_samples == 10**12 and index.rows(np.array([10**12 - 1]), ["mean"])["mean"].tolist() == [0.0]
    assert time.monotonic() - started < 1.0


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_missing_samples_are_named(tmp_path: Path) -> None:
    for number in (1, 3):
        write_shard(tmp_path, MANIFEST, ROWS, (number, 5))
    ranges = ", ".join(f"{13 * i // 5 * 8} to {min(13 * (i + 1) // 5 * 8, 103) - 1}" for i in (0, 2, 4))
    with pytest.raises(UserError, match=f"55 of 103 samples are not scored: {ranges}"):
        opened(tmp_path)


def test_shards_of_two_divisions_are_refused_by_writer_and_reader(tmp_path: Path) -> None:
    write_index(tmp_path / "a", MANIFEST, ROWS, 2)
    with pytest.raises(
        UserError, match=r"--output .*holds samples-0{15}-0{13}48, which overlaps samples-0{13}32-0{13}64.*--shard i/n"
    ):
        ShardWriter(tmp_path / "a", MANIFEST, shard_blocks(13, (1, 3)))
    write_index(tmp_path / "b", MANIFEST, ROWS, 3)
    with pytest.raises(UserError, match=r"--scores: .*/b/samples-0{15}-0{13}32 and .*/a/samples-0{15}-0{13}48 overlap"):
        opened(tmp_path / "b", tmp_path / "a")


def test_an_unfinished_shard_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, MANIFEST, ROWS, 2)
    _, _, shard = shard_paths(tmp_path)[1]
    (shard / "shard.json").unlink()
    with pytest.raises(UserError, match=f"--scores: {shard} is not finished"):
        opened(tmp_path)


@pytest.mark.parametrize("change, told", [(-1, "truncated"), (3, "longer than it was"), (None, "truncated: it has 0 bytes")])
def test_a_column_of_another_size_is_refused(tmp_path: Path, change: int | None, told: str) -> None:
    path = write_shard(tmp_path, MANIFEST, ROWS, (0, 1)) / "mean_zeroed_10.npy"
    if change is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + change)
    with pytest.raises(UserError, match=f"{path} is {told}.*540"):
        opened(tmp_path)


def test_a_shard_of_another_index_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "a", MANIFEST, ROWS, 2)
    write_index(tmp_path / "b", dataclasses.replace(MANIFEST, teacher="v"), ROWS, 2)
    (_, _, ours), (_, _, theirs) = shard_paths(tmp_path / "a")[0], shard_paths(tmp_path / "b")[0]
    shutil.rmtree(ours)
    theirs.rename(ours)
    with pytest.raises(UserError, match=f"{ours} is a shard of another index"):
        opened(tmp_path / "a")


@pytest.mark.parametrize("content", ["{", '{"format": 1}', '{"format": 1, "index": "", "first": 0, "end": 1, "columns": {}}'])
def test_a_damaged_shard_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = write_shard(tmp_path, MANIFEST, ROWS, (0, 1)) / "shard.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"shard\.json"):
        opened(tmp_path)


def test_a_changed_byte_is_found_by_verify_and_not_merged(tmp_path: Path) -> None:
    index = write_index(tmp_path / "a", MANIFEST, ROWS, 2)
    for name in ROWS:
        index.verify(name)
    path = index.shards[1].path / "mean.npy"
    with open(path, "r+b") as stream:
        stream.seek(200)
        stream.write(b"\xff")
    opened(tmp_path / "a").verify("median")
    with pytest.raises(UserError, match=f"{path} has content hash"):
        opened(tmp_path / "a").verify("mean")
    with pytest.raises(UserError, match=f"{path} has content hash"):
        merge(index, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_shrinks_under_a_reader_is_an_error_with_a_name(tmp_path: Path) -> None:
    index = write_index(tmp_path, MANIFEST, ROWS)
    os.truncate(index.shards[0].path / "mean.npy", 300)
    with pytest.raises(UserError, match=r"mean\.npy ends at byte 300"):
        index.read("mean", 0, 103)


def test_an_unknown_column_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    index = write_index(tmp_path, MANIFEST, ROWS)
    for use in (index.verify, index.chunks, lambda name: index.rows(np.array([1]), [name])):
        with pytest.raises(UserError, match="no column median_zeroed_7.*median_zeroed_1, mean_zeroed_1.*content"):
            use("median_zeroed_7")
