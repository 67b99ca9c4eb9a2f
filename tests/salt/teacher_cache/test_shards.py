"""Files of a cache: what is read is what was written, or the file is refused by name. Without ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt.routing import received_positions
from megatron_salt.salt.teacher_cache import writer as writer_module
from megatron_salt.salt.teacher_cache.shards import Index, SampleShape, open_shard, shard_names, write_shard
from megatron_salt.salt.teacher_cache.writer import CacheWriter

SHAPE = SampleShape(seq_length=8, hidden_size=3, dtype="float32")
IDS = np.array([40, 7, 1 << 40])


def hidden(ids: np.ndarray, shape: SampleShape = SHAPE) -> np.ndarray:
    """What the samples of these tests hold: another value everywhere."""
    values = np.arange(shape.seq_length * shape.hidden_size).reshape(shape.seq_length, shape.hidden_size)
    return (ids[:, None, None] % 1000 * 100 + values).astype(shape.numpy_dtype)


def index_of(directory: Path, shape: SampleShape = SHAPE) -> Index:
    return Index([open_shard(directory / name, shape) for name in shard_names(directory)], shape)


def read(index: Index, ids: np.ndarray, slices: list[slice]) -> np.ndarray:
    shape = index.shape
    out = np.zeros((len(ids), sum(one.stop - one.start for one in slices), shape.hidden_size), shape.numpy_dtype)
    index.read(ids, slices, out)
    return out


CUTS = [
    (layout, seq_length)
    for layout in (Layout(), Layout(tensor=2), Layout(context=2), Layout(tensor=3, context=2))
    for seq_length in (7, 8, 24, 96)
    if layout == Layout() or seq_length % (2 * layout.tensor * layout.context) == 0
]


@pytest.mark.parametrize("layout, seq_length", CUTS)
def test_every_rank_reads_its_own_positions(tmp_path: Path, layout: Layout, seq_length: int) -> None:
    """Segments need not begin where a rank's share does. A rank reads at most a segment more at each end."""
    shape = SampleShape(seq_length, 3, "bfloat16")
    write_shard(tmp_path, IDS, hidden(IDS, shape), shape)
    write_shard(tmp_path, np.array([5]), hidden(np.array([5]), shape), shape)
    index, wanted = index_of(tmp_path, shape), np.array([7, 5, 40, 7])
    for cp in range(layout.context):
        for tp in range(layout.tensor):
            slices = received_positions(layout, seq_length, cp, tp)
            positions = np.concatenate([np.arange(seq_length)[one] for one in slices])
            np.testing.assert_array_equal(read(index, wanted, slices), hidden(wanted, shape)[:, positions])
    np.testing.assert_array_equal(index.has(np.array([0, 7, 6, 1 << 40, 1 << 41])), [False, True, False, True, False])


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    index = index_of(tmp_path)
    assert len(index) == 0 and not index.has(np.array([0, 3])).any()


def altered(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


@pytest.mark.parametrize("damage", [altered, lambda content, position: content[:position]], ids=["altered", "cut"])
def test_damage_at_any_byte_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> None:
    path = write_shard(tmp_path, IDS, hidden(IDS), SHAPE)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(damage(content, position))
        with pytest.raises(UserError) as refused:
            read(index_of(tmp_path), IDS, [slice(0, 8)])
        assert str(refused.value).startswith(f"--teacher-cache: {path} is damaged: ") and "; delete the file" in str(
            refused.value
        )


def test_a_file_of_another_cache_is_refused_by_name(tmp_path: Path) -> None:
    """Samples have the same numbers and the same shape for every teacher."""
    own, other = (replace(SHAPE, cache=32 * digits) for digits in ("ab", "cd"))
    write_shard(tmp_path, IDS, hidden(IDS), own)
    assert len(index_of(tmp_path, own)) == 3
    foreign = write_shard(tmp_path, np.array([5]), hidden(np.array([5])), other)
    with pytest.raises(UserError, match=f"^--teacher-cache: {foreign} belongs to another cache: .* move the file away$"):
        index_of(tmp_path, own)


def test_what_a_killed_writer_leaves_is_not_believed(tmp_path: Path) -> None:
    killed = mock.patch("megatron_salt.files.os.replace", side_effect=KeyboardInterrupt)
    cleans_nothing_up = mock.patch("megatron_salt.files.Path.unlink")
    with killed, cleans_nothing_up, pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, IDS, hidden(IDS), SHAPE)
    assert len(list(tmp_path.iterdir())) == 1 and len(index_of(tmp_path)) == 0


def test_a_sample_that_two_runs_wrote_is_there_once(tmp_path: Path) -> None:
    for _ in range(2):
        write_shard(tmp_path, IDS, hidden(IDS), SHAPE)
    index = index_of(tmp_path)
    assert len(index) == 3
    np.testing.assert_array_equal(read(index, IDS, [slice(2, 4)]), hidden(IDS)[:, 2:4])


# ---- the thread that writes --------------------------------------------------------------------------------------------


def computed(ids: np.ndarray) -> torch.Tensor:
    """[L, n, h]"""
    return torch.from_numpy(hidden(ids)).transpose(0, 1)


@pytest.mark.parametrize("shard_bytes, shards", [(1, 4), (5 * SHAPE.num_bytes, 2), (1 << 20, 1)])
def test_a_forward_pass_is_in_one_shard_and_no_sample_is_written_twice(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    write_shard(tmp_path, np.array([3]), hidden(np.array([3])), SHAPE)
    writer = CacheWriter(tmp_path, index_of(tmp_path), shard_bytes)
    for first in (0, 2, 4, 6, 4):
        ids = np.array([first, first + 1])
        writer.keep(ids, computed(ids))
    writer.keep(np.array([8, 8]), computed(np.array([8, 8])))  # the second one fills the pass
    writer.finish()
    index = index_of(tmp_path)
    np.testing.assert_array_equal(read(index, np.arange(9), [slice(0, 8)]), hidden(np.arange(9)))
    assert writer.num_samples == 8 and sum(len(shard.ids) for shard in index.shards) == 9
    assert len(index.shards) in (1 + shards, 2 + shards)  # and the one of before
    for shard in index.shards:
        for pair in ((0, 1), (4, 5), (6, 7)):
            assert len({*pair} & {*shard.ids.tolist()}) in (0, 2)


def test_a_full_disk_ends_the_writing_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer, write, calls = CacheWriter(tmp_path, index_of(tmp_path), 1), writer_module.write_shard, []

    def full(*arguments: object) -> Path:
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)  # type: ignore[arg-type]

    with mock.patch.object(writer_module, "write_shard", full):
        for sample in range(5):
            writer.keep(np.array([sample]), computed(np.array([sample])))
            writer.finish()
    assert len(calls) == 2 and writer.num_samples == 1 and len(index_of(tmp_path)) == 1
    assert capsys.readouterr().err == (
        f"warning: --teacher-cache {tmp_path} cannot be written (No space left on device); the training goes on, and this rank adds no "
        "more to it; what is there stays good\n"
    )


def test_a_mistake_of_ours_in_the_thread_is_not_lost(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, index_of(tmp_path), 1)
    with mock.patch.object(writer_module, "write_shard", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        writer.keep(np.array([1]), computed(np.array([1])))
        writer.finish()
