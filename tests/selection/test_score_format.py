"""A score index is the same bytes however it was divided, interrupted and merged; what is not whole is refused by name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.errors import UserError
from megatron_salt.selection import score_reader
from megatron_salt.selection.score_format import (
    claim,
    columns,
    content_hashes,
    shard_blocks,
    shard_paths,
)
from megatron_salt.selection.score_reader import ScoreIndex, merge
from megatron_salt.selection.score_writer import ShardWriter
from tests.support.selections import files_in, manifest_of, random_rows, write_blocks, write_index, write_shard

MANIFEST = manifest_of([45, 1, 57])  # 103 samples in 13 blocks, the last of 7
ROWS = random_rows(MANIFEST)
FIRST, SECOND, THIRD = MANIFEST.datasets


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync is for is tested by the order of calls; waiting for the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def opened(*directories: Path) -> ScoreIndex:
    return ScoreIndex.open([str(directory) for directory in directories])


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an index that one job wrote without being disturbed."""
    directory = tmp_path_factory.mktemp("unsharded")
    write_shard(directory, MANIFEST, ROWS, (0, 1))
    return files_in(directory)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_columns_are_these() -> None:
    kinds = columns((1, 10), 2048)
    of_k = ("median_zeroed", "mean_zeroed", "median_dropped", "mean_dropped", "share")
    assert list(kinds) == [f"{name}_{k}" for k in (1, 10) for name in of_k] + ["median", "mean", "entropy", "tokens", "content"]
    assert {str(dtype) for name, dtype in kinds.items() if name not in ("tokens", "content")} == {"float32"}
    assert kinds["content"] == np.uint64
    assert [columns((), length)["tokens"] for length in (65535, 65536)] == [np.uint16, np.uint32]


def test_equal_windows_alone_have_equal_hashes() -> None:
    """Oracle: blake2b of each row's bytes."""
    tokens = np.random.default_rng(0).integers(0, 1 << 31, (50, 9))
    tokens[30] = tokens[20]
    hashes = content_hashes(tokens)
    assert hashes.dtype == np.uint64 and len(set(hashes.tolist())) == 49
    for row, found in zip(tokens, hashes.tolist(), strict=True):
        digest = hashlib.blake2b(b"".join(int(token).to_bytes(4, "little") for token in row), digest_size=8).digest()
        assert int.from_bytes(digest, "little") == found
    assert content_hashes(tokens.astype(np.int32)[:, ::-1]).tolist() == content_hashes(tokens[:, ::-1]).tolist()
    assert len(content_hashes(tokens[:0])) == 0


def test_every_column_is_a_plain_numpy_file(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, MANIFEST, ROWS, (0, 1))
    assert shard.name == "samples-000000000000000-000000000000103"
    assert {path.name for path in shard.iterdir()} == {"shard.json", *(f"{name}.npy" for name in ROWS)}
    for name, values in ROWS.items():
        found = np.load(shard / f"{name}.npy", mmap_mode="r")
        assert found.dtype == values.dtype and np.array_equal(found, values), name


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 20])
def test_any_number_of_shards_gives_the_same_index(tmp_path: Path, unsharded: dict[str, bytes], num_shards: int) -> None:
    index = write_index(tmp_path / "shards", MANIFEST, ROWS, num_shards)
    assert len(index.shards) == min(num_shards, 13)
    for name, values in ROWS.items():
        assert np.array_equal(index.read(name, 0, 103), values)
    merge(index, tmp_path / "merged")
    assert files_in(tmp_path / "merged") == unsharded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "shards"]


def test_shards_of_several_directories_are_one_index(tmp_path: Path, unsharded: dict[str, bytes]) -> None:
    for number, name in enumerate("bac"):
        write_shard(tmp_path / name, dataclasses.replace(MANIFEST, teacher_directory=name), ROWS, (number, 3))
    index = opened(*(tmp_path / name for name in "abc"))
    assert np.array_equal(index.read("content", 0, 103), ROWS["content"])
    index = opened(*(tmp_path / name for name in "cab"))
    merge(index, tmp_path / "merged")
    assert {**files_in(tmp_path / "merged"), "index.json": b""} == {**unsharded, "index.json": b""}


@pytest.mark.parametrize("num_blocks, num_shards", [(13, 1), (13, 4), (13, 13), (3, 7), (10**9, 1000)])
def test_shards_part_the_blocks_evenly(num_blocks: int, num_shards: int) -> None:
    parts = [shard_blocks(num_blocks, (i, num_shards)) for i in range(num_shards)]
    assert parts[0].start == 0 and parts[-1].stop == num_blocks
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_finished_block_is_not_repeated_and_an_unfinished_one_is(tmp_path: Path, unsharded: dict[str, bytes]) -> None:
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))
    assert writer.todo == list(range(13))
    write_blocks(writer, MANIFEST, ROWS, [12, 3, 4])
    assert writer.todo == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    writer.close()
    again = ShardWriter(tmp_path, MANIFEST, range(13))
    assert again.todo == writer.todo
    write_blocks(again, MANIFEST, ROWS, [3, *again.todo])  # writing one twice changes nothing
    again.finish()
    assert files_in(tmp_path) == unsharded
    last = ShardWriter(tmp_path, MANIFEST, range(13))
    assert last.todo == []
    last.finish()
    assert files_in(tmp_path) == unsharded


@pytest.mark.parametrize("seed", range(12))
def test_files_cut_or_torn_anywhere_are_mended(tmp_path: Path, unsharded: dict[str, bytes], seed: int) -> None:
    """Damage as a kill or a lost page leaves it: a file ends early, or a stretch of it is zeros or old bytes. Blocks that it did not
    touch are kept."""
    random = np.random.default_rng(seed)
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))
    write_blocks(writer, MANIFEST, ROWS, random.permutation(13)[: random.integers(1, 14)].tolist())
    before = writer.todo
    writer.close()
    damaged = set()
    for path in random.permutation(sorted(writer.path.iterdir()))[: random.integers(1, 6)]:
        size = path.stat().st_size
        start, length = int(random.integers(0, size)), int(random.integers(1, 40))
        if random.integers(2):
            os.truncate(path, start)
            length = size
        else:
            with open(path, "r+b") as stream:
                stream.seek(start)
                stream.write(random.bytes(min(length, size - start)))
        header, width = (0, 16) if path.name == "blocks.journal" else (128, 8 * ROWS[path.stem].dtype.itemsize)
        damaged |= set(range(max(start - header, 0) // width, min(max(start + length - header, 0) // width, 12) + 1))
    again = ShardWriter(tmp_path, MANIFEST, range(13))
    assert set(before) <= set(again.todo) <= set(before) | damaged
    write_blocks(again, MANIFEST, ROWS, list(again.todo))
    again.finish()
    assert files_in(tmp_path) == unsharded


def _score_slowly(directory: Path) -> None:
    claim(directory, MANIFEST)
    writer = ShardWriter(directory, MANIFEST, range(13))
    for block in list(writer.todo):
        write_blocks(writer, MANIFEST, ROWS, [block])
    writer.finish()


def test_a_job_that_is_killed_again_and_again_writes_what_one_that_is_not_does(
    tmp_path: Path, unsharded: dict[str, bytes]
) -> None:
    context = multiprocessing.get_context("fork")
    random, kills = np.random.default_rng(0), 0
    for _ in range(8):
        job = context.Process(target=_score_slowly, args=(tmp_path,))
        job.start()
        time.sleep(float(random.uniform(0, 0.04)))
        kills += job.is_alive()
        job.kill()
        job.join()
    write_shard(tmp_path, MANIFEST, ROWS, (0, 1))
    assert kills
    found = {
        name: content for name, content in files_in(tmp_path).items() if not name.startswith("index.json.")
    }  # a killed claim's
    assert found == unsharded


def test_a_job_killed_right_after_its_last_file_leaves_no_journal_for_good(tmp_path: Path, unsharded: dict[str, bytes]) -> None:
    shard = write_shard(tmp_path, MANIFEST, ROWS, (0, 1))
    (shard / "blocks.journal").write_bytes(bytes(16 * 13))
    assert ShardWriter(tmp_path, MANIFEST, range(13)).todo == []
    assert files_in(tmp_path) == unsharded


def test_the_journal_speaks_of_what_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is written and forced to disk, then its digest; a shard is declared finished before its journal goes."""
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))
    calls: list[str] = []

    def told(what: str, function: Callable, path_of: Callable) -> Callable:
        def call(first: object, *rest: object) -> object:
            calls.append(f"{what} {path_of(first)}")
            return function(first, *rest)

        return call

    def open_file(descriptor: object) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", told("write", os.pwrite, open_file))
        patched.setattr(os, "fsync", told("sync", os.fsync, open_file))
        patched.setattr(os, "unlink", told("delete", os.unlink, os.path.basename))
        patched.setattr(os, "replace", told("rename", os.replace, os.path.basename))
        write_blocks(writer, MANIFEST, ROWS, [5])
        files = [f"{name}.npy" for name in ROWS]
        assert sorted(calls[: len(files)]) == sorted(f"write {file}" for file in files)
        assert sorted(calls[len(files) : -2]) == sorted(f"sync {file}" for file in files)
        assert calls[-2:] == ["write blocks.journal", "sync blocks.journal"]
        write_blocks(writer, MANIFEST, ROWS, list(writer.todo))
        calls.clear()
        writer.finish()
        assert calls == ["sync shard.json.tmp", "rename shard.json.tmp", f"sync {writer.path.name}", "delete blocks.journal"]


def test_the_disks_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left.*median_zeroed_1.npy") as error:
            write_blocks(writer, MANIFEST, ROWS, [0])
        assert error.value.errno == errno.ENOSPC
    assert writer.todo == list(range(13))


# --- several jobs at once ---------------------------------------------------------------------------------------------


def test_jobs_may_claim_at_once_and_the_first_decides(tmp_path: Path) -> None:
    others = [dataclasses.replace(MANIFEST, teacher_step=step) for step in range(2)]
    for turn in range(10):
        directory, barrier, outcomes = tmp_path / str(turn), threading.Barrier(6), []

        def job(
            number: int, directory: Path = directory, barrier: threading.Barrier = barrier, outcomes: list = outcomes
        ) -> None:
            barrier.wait()
            try:
                claim(directory, others[number % 2])
                outcomes.append((number % 2, ""))
            except UserError as error:
                outcomes.append((number % 2, str(error)))

        jobs = [threading.Thread(target=job, args=(number,)) for number in range(6)]
        for one in jobs:
            one.start()
        for one in jobs:
            one.join()
        won = {number for number, told in outcomes if not told}
        assert len(won) == 1 and len(outcomes) == 6
        assert all("teacher step" in told for number, told in outcomes if number not in won)
        assert [path.name for path in directory.iterdir()] == ["index.json"]


def test_a_shard_has_one_writer_at_a_time(tmp_path: Path) -> None:
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))
    with pytest.raises(UserError, match="samples-0{15}-0{12}103 is being written by another process.*--shard"):
        ShardWriter(tmp_path, MANIFEST, range(13))
    write_blocks(writer, MANIFEST, ROWS, range(13))
    writer.finish()
    assert ShardWriter(tmp_path, MANIFEST, range(13)).todo == []


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts, told",
    [
        ({"seq_length": 32}, "seq length is 16 there and 32 here"),
        ({"teacher": "v"}, "teacher is w there and v here"),
        ({"tokenizer": "u", "vocabulary": 300}, "vocabulary is 257 there and 300 here; tokenizer is t there and u here"),
        ({"top_k": (1, 5)}, r"top k is \(1, 10\) there and \(1, 5\) here"),
        ({"block_samples": 16}, "block samples is 8 there and 16 here"),
        ({"masking": {**MANIFEST.masking, "eod_mask_loss": True}}, "eod_mask_loss is False there and True here"),
        ({"datasets": MANIFEST.datasets[:2]}, "dataset 3, d2, is there alone"),
        ({"datasets": (*MANIFEST.datasets, DatasetFacts("new", "f", 1))}, "dataset 4, new, is here alone"),
        ({"datasets": (FIRST, DatasetFacts("x", "content:1", 2), THIRD)}, "samples of dataset 2, x, is 1 there and 2 here"),
        ({"datasets": (FIRST, DatasetFacts("x", "f", 1), THIRD)}, "fingerprint of dataset 2, x, is content:1 there and f here"),
    ],
)
def test_an_index_of_other_scores_is_refused_by_what_differs(tmp_path: Path, facts: dict, told: str) -> None:
    other = dataclasses.replace(MANIFEST, **facts)
    claim(tmp_path / "a", MANIFEST)
    with pytest.raises(UserError, match=f"--output .*other scores: {told}$"):
        claim(tmp_path / "a", other)
    claim(tmp_path / "b", other)
    with pytest.raises(UserError, match=r"--scores .*a \(there\).*other scores than .*b \(here\)"):
        opened(tmp_path / "b", tmp_path / "a")
    assert MANIFEST.fingerprint != other.fingerprint


def test_where_things_lay_makes_no_difference(tmp_path: Path) -> None:
    moved = tuple(dataclasses.replace(dataset, prefix=f"elsewhere/{dataset.prefix}") for dataset in MANIFEST.datasets)
    other = dataclasses.replace(MANIFEST, datasets=moved, teacher_directory="elsewhere")
    claim(tmp_path, MANIFEST)
    claim(tmp_path, other)
    assert MANIFEST.fingerprint == other.fingerprint


def test_a_claim_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file.* cannot be written"):
        claim(tmp_path / "file" / "scores", MANIFEST)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1}', None])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str | None) -> None:
    claim(tmp_path, MANIFEST)
    path = tmp_path / "index.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "datasets": [{"prefix": 1}]}) if content is None else content)
    with pytest.raises(UserError, match=r"index\.json"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"index\.json"):
        claim(tmp_path, MANIFEST)


def test_no_index_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--scores .*nothing is no score index"):
        opened(tmp_path / "nothing")
    with pytest.raises(UserError, match="--scores is missing"):
        ScoreIndex.open([])


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
