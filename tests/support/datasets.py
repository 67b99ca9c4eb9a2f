"""Datasets for the tests of data/."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: see there)

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

WriteDataset = Callable[..., str]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """write(name, documents, dtype=np.uint16) -> prefix of a dataset that megatron-core's own builder wrote."""

    def write(name: str, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            builder.add_item(torch.tensor(document, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


def write_sparse(path: Path, num_tokens: int, num_sequences: int, tail: list[int]) -> str:
    """Write a uint16 dataset of zeros that ends in `tail`. The zeros are a hole in the file; lengths and pointers are as usual."""
    last_length = num_tokens - (num_sequences - 1) * (num_tokens // num_sequences)
    with open(f"{path}.idx", "wb") as idx:
        idx.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_sequences, num_sequences + 1))
        idx.seek(34 + 4 * (num_sequences - 1))
        idx.write(struct.pack("<i", last_length))
        idx.seek(34 + 4 * num_sequences + 8 * (num_sequences - 1))
        idx.write(struct.pack("<q", 2 * (num_tokens - last_length)))
        idx.truncate(34 + 12 * num_sequences + 8 * (num_sequences + 1))
    with open(f"{path}.bin", "wb") as file:
        file.seek(2 * (num_tokens - len(tail)))
        file.write(np.array(tail, np.uint16).tobytes())
    return str(path)


def bytes_read() -> int:
    """Bytes that this process has read so far."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0
