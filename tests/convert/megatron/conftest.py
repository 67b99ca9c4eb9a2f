"""Megatron's checkpoints of random models, and our imports of them, made once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_salt.checkpoint.safe_unpickle import read_metadata
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.tools.convert_checkpoint import main
from tests.convert.megatron.megatron_models import (
    write_checkpoint,
    write_tokenizer,
)
from tests.support.ranks import run_ranks


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a tokenizer with `IDS` ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[float]]]:
    """A checkpoint in one of the FORMS, written once: (its root, its losses by megatron-core's GPTModel)."""
    directory, made = tmp_path_factory.mktemp("megatron"), {}

    def write(name: str) -> tuple[Path, list[float]]:
        if name not in made:
            made[name] = run_ranks(2, write_checkpoint, directory / name, name)[0]
        return directory / name, made[name]

    return write


Written = Callable[[str], tuple[Path, list[float]]]


def convert_here(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run the tool in this process: (exit status, what it wrote)."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    written = capsys.readouterr()
    return status, written.out + written.err


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    [directory] = root.glob("iter_*")
    files = TensorFiles(directory, read_metadata(directory))
    return {key: files.read(key, tuple(0 for _ in shape), shape) for key, (shape, _) in files.sizes().items()}


@pytest.fixture(scope="session")
def imported(
    written: Written, tokenizer: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, str]]:
    """A checkpoint in one of the FORMS, imported once: (its directory of checkpoints, what the import told)."""
    directory, made = tmp_path_factory.mktemp("imported"), {}

    def make(name: str) -> tuple[Path, str]:
        if name not in made:
            root = written(name)[0]
            source = root if name == "stacked layers" else root / "iter_0000123"
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                words = ("import", source, "--from", "megatron", "--to", directory / name, *tokenizer)
                assert main([str(word) for word in words]) == 0
            made[name] = told.getvalue()
        return directory / name, made[name]

    return make


Imported = Callable[[str], tuple[Path, str]]
