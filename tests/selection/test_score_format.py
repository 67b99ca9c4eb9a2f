"""A score index says what its scores are of: columns, shards and manifests; another index is refused by what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.errors import UserError
from megatron_salt.selection.score_format import (
    claim,
    columns,
    content_hashes,
    shard_blocks,
)
from megatron_salt.selection.score_reader import ScoreIndex, merge
from tests.support.selections import MANIFEST, ROWS, files_in, write_index, write_shard

FIRST, SECOND, THIRD = MANIFEST.datasets


def opened(*directories: Path) -> ScoreIndex:
    return ScoreIndex.open([str(directory) for directory in directories])


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_columns_are_these() -> None:
    kinds = columns((1, 10), 2048)
    of_k = ("median_zeroed", "mean_zeroed", "median_dropped", "mean_dropped", "share")
    assert list(kinds) == [f"{name}_{k}" for k in (1, 10) for name in of_k] + ["median", "mean", "entropy", "tokens", "content"]
    assert {str(dtype) for name, dtype in kinds.items() if name not in ("tokens", "content")} == {"float32"}
    assert kinds["content"] == np.uint64
    assert [columns((), length)["tokens"] for length in (65535, 65536)] == [np.uint16, np.uint32]


def test_equal_windows_alone_have_equal_hashes() -> None:
    """The oracle: blake2b of the bytes of each row."""
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
    with pytest.raises(UserError, match=rf"--output .*other scores \(index\.json\): {told}$"):
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
