"""preprocess_data in tests: input files, the tool in this process and in one of its own, and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pyarrow
import pyarrow.parquet

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: its imports expect a GPU)

from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_salt.cli import run_tool
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "the quick brown fox, ça et là 日本 🎉\n" * (i % 7 + 1) for i in range(120)]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


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
    """The tool's exit status."""
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    return run_tool(PreprocessConfig, preprocess, ["--input", *names, "--output-prefix", str(prefix), *tokenizer, *flags])


def dataset(prefix: Path, key: str = "text") -> list[list[int]]:
    """The documents as mcore reads them."""
    return [document.tolist() for document in IndexedDataset(f"{prefix}_{key}_document")]


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def tool(*flags: str, limit_blocks: int | None = None, stderr: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """The tool as a user starts it, from the repository's root; `limit_blocks` KiB a file stand for a full disk."""
    command = [sys.executable, "tools/preprocess_data.py", *flags]
    if limit_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_blocks}; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
