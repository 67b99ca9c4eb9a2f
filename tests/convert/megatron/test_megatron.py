"""Checkpoints of Megatron-LM and Megatron-Bridge in and out: megatron-core's own GPTModel computes the same before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.tokenizer.tokenizer import load_tokenizer
from tests.convert.megatron.conftest import Imported, Written, convert_here, tensors_of
from tests.convert.megatron.megatron_models import (
    CONTEXT,
    FORMS,
    IDS,
    ROWS,
    losses_of_export,
)
from tests.support.program import train, write_tokens
from tests.support.ranks import run_ranks


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


@pytest.mark.long
def test_a_trained_model_computes_the_same_in_megatron_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's own checkpoint, with optimizer and random state; its reference losses are what GPTModel computes."""
    tokens = np.random.default_rng(0).integers(0, IDS - 1, 8 * CONTEXT * 3).astype(np.uint16)
    data = write_tokens(tmp_path / "bytes", tokens)
    train(2, seq_length=CONTEXT, tensor_model_parallel_size=2, data_path=data, train_iters=2, save=tmp_path / "run")
    status, told = convert_here(capsys, "export", tmp_path / "run", tmp_path / "out", "--to", "megatron", "--dtype", "float32")
    assert status == 0, told
    state = read_state(tmp_path / "run" / "iter_0000002")
    assert state.reference_losses is not None
    for losses, args in run_ranks(2, losses_of_export, tmp_path / "out", model_of(state.architecture), ROWS):
        assert losses == pytest.approx(state.reference_losses.losses, rel=1e-5)
        assert "tokenizer_type" not in args
    words = ("--from", "megatron", "--to", tmp_path / "again", "--tokenizer-type", "ByteLevelTokenizer")
    assert convert_here(capsys, "import", tmp_path / "out", *words)[0] == 0
    before, after = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "again")
    for key, tensor in after.items():
        rows = slice(IDS if "word_embeddings" in key or "output_layer" in key else None)  # the others are padding
        assert torch.equal(before[key][rows], tensor[rows]), key


def test_a_model_of_bytes_is_imported_without_a_file(
    written: Written, imported: Imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--from", "megatron", "--to", tmp_path / "bytes", "--tokenizer-type", "ByteLevelTokenizer")
    status, told = convert_here(capsys, "import", written("stacked layers")[0], *words)
    assert status == 0, told
    assert load_tokenizer(next((tmp_path / "bytes").glob("iter_*")) / "tokenizer").kind == "ByteLevelTokenizer"
    ours, theirs = tensors_of(tmp_path / "bytes"), tensors_of(imported("stacked layers")[0])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
