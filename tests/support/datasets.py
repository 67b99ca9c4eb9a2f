"""Datasets of tests: by megatron-core's builder, of holes on disk, or of text by preprocess_data; and how tests read them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: see there)

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_salt.cli import run_tool
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess

WriteDataset = Callable[..., str]
ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "the quick brown fox, ça et là 日本 🎉\n" * (i % 7 + 1) for i in range(120)]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


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


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = [json.dumps({key: text, "other": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_table(path: Path, columns: dict, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def run(inputs: Path | list[Path], prefix: Path, *flags: str, tokenizer: list[str] = BYTES) -> int:
    """Run preprocess_data in this process. Returns the exit status."""
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    return run_tool(PreprocessConfig, preprocess, ["--input", *names, "--output-prefix", str(prefix), *tokenizer, *flags])


def dataset(prefix: Path, key: str = "text") -> list[list[int]]:
    """Documents of a dataset, as megatron-core reads them."""
    return [document.tolist() for document in IndexedDataset(f"{prefix}_{key}_document")]


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def tool(*flags: str, limit_blocks: int | None = None, stderr: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start preprocess_data as a user does. With `limit_blocks` a file may have that many KiB, as on a full disk."""
    command = [sys.executable, "tools/preprocess_data.py", *flags]
    if limit_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_blocks}; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
