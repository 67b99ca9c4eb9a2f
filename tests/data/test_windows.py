"""Windows: what they hold, what opening costs, and what is refused."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.windows import TokenFile, Windows
from megatron_salt.errors import UserError
from tests.support.datasets import WriteDataset, bytes_read, write_sparse

DOCUMENTS = [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0], [10]]  # 13 tokens
STREAM = [token for document in DOCUMENTS for token in document]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("seq_length", [1, 3, 4, 5, 12])
def test_windows_are_slices_of_the_stream_and_share_one_token(
    write_dataset: WriteDataset, seq_length: int, dtype: type
) -> None:
    file = TokenFile.open(write_dataset("web", DOCUMENTS, dtype))
    windows = Windows(file, seq_length)
    assert (file.num_tokens, file.num_documents, file.dtype) == (13, 4, np.dtype(dtype))
    assert len(windows) == (13 - 1) // seq_length
    expected = [STREAM[i * seq_length : i * seq_length + seq_length + 1] for i in range(len(windows))]
    assert [windows.read(i).tolist() for i in range(len(windows))] == expected
    backwards = windows.read_many(np.arange(len(windows))[::-1])
    assert backwards.dtype == np.int64 and backwards.tolist() == expected[::-1]


def test_ids_of_the_largest_dtype_keep_their_value(write_dataset: WriteDataset) -> None:
    assert Windows(TokenFile.open(write_dataset("web", [[65535, 40000, 7]])), 2).read(0).tolist() == [65535, 40000, 7]
    assert Windows(TokenFile.open(write_dataset("code", [[200000, 1, 7]], np.int32)), 2).read(0).tolist() == [200000, 1, 7]


def test_empty_documents_are_fine(write_dataset: WriteDataset) -> None:
    file = TokenFile.open(write_dataset("web", [[], [1, 2], [], [3, 4], []]))
    assert (file.num_tokens, file.num_documents) == (4, 5)
    assert Windows(file, 3).read(0).tolist() == [1, 2, 3, 4]


def test_a_billion_windows_open_without_reading_or_building_an_index(tmp_path: Path) -> None:
    """Oracle: the bytes that were read, and the memory that was allocated, are those of a handful of tokens."""
    num_windows, seq_length, num_sequences = 10**9, 16, 10**8  # .idx of 2 GB, .bin of 32 GB, both holes
    prefix = write_sparse(tmp_path / "huge", num_windows * seq_length + 1, num_sequences, tail=list(range(1, seq_length + 2)))
    before = bytes_read()
    tracemalloc.start()
    windows = Windows(TokenFile.open(prefix), seq_length)
    last = windows.read(num_windows - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) == num_windows
    assert last.tolist() == list(range(1, seq_length + 2))
    assert peak < 1 << 20
    assert bytes_read() - before < 1 << 20


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(path: str, change: int) -> None:
    os.truncate(path, os.path.getsize(path) + change)


# DOCUMENTS: header 34 bytes, 4 lengths at 34, 4 pointers at 50, 5 boundaries at 82; .idx 122 bytes, .bin 26 bytes.
DAMAGE = {
    "no .bin": (lambda p: os.remove(p + ".bin"), "web.bin does not exist"),
    "no .idx": (lambda p: os.remove(p + ".idx"), "web.idx does not exist"),
    ".bin truncated": (lambda p: cut(p + ".bin", -2), "web.bin is truncated: it has 24 bytes, .* 13 uint16 tokens, 26 bytes"),
    ".bin empty": (lambda p: os.truncate(p + ".bin", 0), "web.bin is truncated: it has 0 bytes"),
    ".bin too long": (lambda p: cut(p + ".bin", 3), "web.bin is longer than its index says: it has 29 bytes"),
    "bad magic": (lambda p: overwrite(p + ".idx", 0, b"MMIDIDY"), "web.idx is not a Megatron index"),
    "bad version": (lambda p: overwrite(p + ".idx", 9, b"\x02"), "web.idx has version 2"),
    "float tokens": (lambda p: overwrite(p + ".idx", 17, b"\x07"), r"web.idx has dtype code 7 \(float32\)"),
    "unknown dtype": (lambda p: overwrite(p + ".idx", 17, b"\x63"), r"web.idx has dtype code 99 \(unknown\)"),
    "header truncated": (lambda p: os.truncate(p + ".idx", 20), "web.idx is truncated: 20 bytes, its header alone takes 34"),
    ".idx truncated": (lambda p: cut(p + ".idx", -8), "web.idx is truncated: it has 114 bytes, .* take 122"),
    ".idx too long": (lambda p: cut(p + ".idx", 8), "web.idx is longer than its header says: it has 130 bytes"),
    "absurd count": (lambda p: overwrite(p + ".idx", 18, b"\xff" * 8), "web.idx is truncated"),
    "odd pointer": (lambda p: overwrite(p + ".idx", 74, b"\x03"), "web.idx is damaged"),
    "negative length": (lambda p: overwrite(p + ".idx", 46, b"\xff" * 4), "web.idx is damaged"),
    "first pointer": (lambda p: overwrite(p + ".idx", 50, b"\x02"), "web.idx is damaged"),
    "wrong last length": (
        lambda p: overwrite(p + ".idx", 46, b"\x05"),
        "web.bin is truncated: it has 26 bytes, .* 17 uint16 tokens",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_sound_dataset_are_refused_by_name(write_dataset: WriteDataset, damage: str) -> None:
    prefix = write_dataset("web", DOCUMENTS)
    harm, message = DAMAGE[damage]
    harm(prefix)
    with pytest.raises(UserError, match=f"^--data-path .*{message}"):
        TokenFile.open(prefix)


@pytest.mark.parametrize("documents, message", [([], "0 sequences"), ([[], []], "2 sequences without a token")])
def test_an_empty_dataset_is_refused(write_dataset: WriteDataset, documents: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=f"^--valid-data-path .*empty.*{message}"):
        TokenFile.open(write_dataset("web", documents), "--valid-data-path")


def test_a_dataset_shorter_than_one_window_is_refused(write_dataset: WriteDataset) -> None:
    file = TokenFile.open(write_dataset("web", DOCUMENTS))
    assert len(Windows(file, 12)) == 1
    with pytest.raises(UserError, match="--data-path .*web: 13 tokens .* --seq-length 13, which takes 14"):
        Windows(file, 13)


def test_a_file_cut_short_after_opening_is_an_error_with_its_name(write_dataset: WriteDataset) -> None:
    prefix = write_dataset("web", DOCUMENTS)
    windows = Windows(TokenFile.open(prefix), 4)
    os.truncate(prefix + ".bin", 21)
    assert windows.read(0).tolist() == STREAM[:5]
    with pytest.raises(UserError, match="web.bin ends at byte 21; it had 26 bytes"):
        windows.read(2)


def test_a_read_that_comes_in_pieces_is_put_together(write_dataset: WriteDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(TokenFile.open(write_dataset("web", DOCUMENTS)), 12)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0].cast("B")[:3]], offset))
    assert windows.read(0).tolist() == STREAM
