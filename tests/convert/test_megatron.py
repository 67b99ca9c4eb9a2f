"""Checkpoints of Megatron-LM and Megatron-Bridge in and out: megatron-core's own GPTModel computes the same before and after."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_salt.checkpoint.safe_unpickle import read_metadata
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.tools.convert_checkpoint import main
from tests.convert.megatron_models import CONTEXT, FORMS, IDS, ROWS, losses_of_export, write_checkpoint, write_tokenizer
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


@pytest.mark.parametrize("name", FORMS)
def test_an_imported_model_computes_what_megatron_core_computed(written: Written, imported: Imported, name: str) -> None:
    root, told = imported(name)
    assert f"rows {IDS} to {ROWS - 1} of {ROWS} are taken for padding and cut" in told
    assert "computed by this program alone" in told and "warning" not in told
    state = read_state(next(root.glob("iter_*")))
    assert model_of(state.architecture) == FORMS[name].model
    assert (state.vocabulary_size, state.seq_length) == (IDS, CONTEXT)
    assert state.reference_losses is not None
    assert state.reference_losses.losses == pytest.approx(written(name)[1], rel=1e-5)


@pytest.mark.parametrize("name", ["stacked layers", "a key for each layer"])
def test_an_export_is_what_megatron_core_loads(
    written: Written,
    imported: Imported,
    tokenizer: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """GPTModel computes the same after a way in and out, over rows that are padded in another way; and in again is bit for bit."""
    out, rows = tmp_path / "out", 320
    status, told = convert_here(capsys, "export", imported(name)[0], out, "--to", "megatron", "--dtype", "float32")
    assert status == 0 and "--use-checkpoint-args --finetune --no-load-optim --no-load-rng --norm-epsilon" in told, told
    for losses, args in run_ranks(2, losses_of_export, out, FORMS[name].model, rows):
        assert losses == pytest.approx(written(name)[1], rel=1e-6)
        assert args["num_layers"] == 3 and args["padded_vocab_size"] == 384 and args["params_dtype"] == torch.float32
    again = convert_here(capsys, "import", out, "--from", "megatron", "--to", tmp_path / "again", *tokenizer)
    assert again[0] == 0, again
    before, after = tensors_of(imported(name)[0]), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (out / "tokenizer").is_dir()


def test_bfloat16_is_rounded_once(
    imported: Imported, tokenizer: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = imported("a key for each layer")
    out = tmp_path / "out"
    assert convert_here(capsys, "export", root, out, "--to", "megatron", "--no-tokenizer")[0] == 0
    assert not (out / "tokenizer").exists()
    assert convert_here(capsys, "import", out / "release", "--from", "megatron", "--to", tmp_path / "again", *tokenizer)[0] == 0
    before, after = tensors_of(root), tensors_of(tmp_path / "again")
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)
