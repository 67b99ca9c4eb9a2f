"""A shard is the same bytes however often its job is killed, and has one writer at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.selection.score_format import (
    claim,
)
from megatron_salt.selection.score_writer import ShardWriter
from tests.support.selections import MANIFEST, ROWS, files_in, write_blocks, write_shard


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
    """Damage as after a kill or a lost page: a file ends early, or a part of it is zeros or old bytes. Undamaged blocks are kept."""
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
    """Data is on disk before its digest is written. A shard is marked as finished before its journal is deleted."""
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


def test_a_shard_has_one_writer_at_a_time(tmp_path: Path) -> None:
    claim(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, range(13))
    with pytest.raises(UserError, match="samples-0{15}-0{12}103 is being written by another process.*--shard"):
        ShardWriter(tmp_path, MANIFEST, range(13))
    write_blocks(writer, MANIFEST, ROWS, range(13))
    writer.finish()
    assert ShardWriter(tmp_path, MANIFEST, range(13)).todo == []
