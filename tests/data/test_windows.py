"""Windows: their tokens, the cost of opening, and datasets that are too short."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.windows import Windows
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
    """Oracle: opening reads few bytes and allocates little memory."""
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
