"""Checkpoints of Megatron-LM and Megatron-Bridge in and out: megatron-core's own GPTModel computes the same before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.tools.convert_checkpoint import main
from tests.convert.megatron_models import CONTEXT, FORMS, IDS, ROWS, write_checkpoint, write_tokenizer
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


@pytest.mark.parametrize("name", FORMS)
def test_an_imported_model_computes_what_megatron_core_computed(
    written: Written, tokenizer: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root, losses = written(name)
    source = root if name == "stacked layers" else root / "iter_0000123"
    status, told = convert_here(capsys, "import", source, "--from", "megatron", "--to", tmp_path / "in", *tokenizer)
    assert status == 0, told
    assert f"rows {IDS} to {ROWS - 1} of {ROWS} are taken for padding and cut" in told
    assert "computed by this program alone" in told and "warning" not in told
    state = read_state(next((tmp_path / "in").glob("iter_*")))
    assert model_of(state.architecture) == replace(FORMS[name].model, make_vocab_size_divisible_by=128)
    assert (state.vocabulary_size, state.seq_length) == (IDS, CONTEXT)
    assert state.reference_losses is not None
    assert state.reference_losses.losses == pytest.approx(losses, rel=1e-5)
