"""Checkpoints of Megatron-LM and Megatron-Bridge in and out: megatron-core's own GPTModel computes the same before and after."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_salt.checkpoint.safe_unpickle import read_metadata
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.convert.megatron.weights import MegatronWeights
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import load_tokenizer
from megatron_salt.tools.convert_checkpoint import main
from tests.convert.megatron.megatron_models import (
    CONTEXT,
    FORMS,
    IDS,
    ROWS,
    losses_of_export,
    write_checkpoint,
    write_tokenizer,
)
from tests.support.program import train, write_tokens
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


# ---- what is refused -----------------------------------------------------------------------------------------------------


class Evil:
    """A pickle of this makes a directory, where the reader calls what the pickle names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _common(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    """Change what common.pt holds; the second argument is a path that a reader must not make."""

    def rewrite(directory: Path) -> None:
        path = directory / "common.pt"
        content = torch.load(path, weights_only=False)
        change(content, directory.parents[1] / "ran")
        torch.save(content, path)

    return rewrite


def _args(**values: object) -> Callable[[Path], None]:
    return _common(lambda content, _: vars(content["args"]).update(values))


def _metadata(change: Callable[[Metadata], None]) -> Callable[[Path], None]:
    """Change the table of contents."""

    def rewrite(directory: Path) -> None:
        metadata = read_metadata(directory)
        change(metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return rewrite


def _drop_tensor(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]


def _add_tensor(metadata: Metadata) -> None:
    known = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    metadata.state_dict_metadata["decoder.layers.mlp.router.weight"] = known


def _many_layers(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size((20000, *entry.size[1:]))


def _point_outside(metadata: Metadata) -> None:
    assert metadata.storage_data is not None
    for place in metadata.storage_data.values():
        place.relative_path = "../../x.distcp"


def _halve_pieces(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.pop()


def _place_nothing(metadata: Metadata) -> None:
    metadata.storage_data = {}


def _no_table(metadata: Metadata) -> None:
    metadata.state_dict_metadata = [metadata.state_dict_metadata]  # type: ignore[assignment]


def _no_size(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].size = "large"  # type: ignore[union-attr]


def _evil_piece(directory: Path) -> None:
    """A pickle in the place of a tensor."""
    metadata, content = read_metadata(directory), io.BytesIO()
    torch.save(Evil(directory.parents[1] / "ran"), content)
    for index, place in (metadata.storage_data or {}).items():
        if index.fqn == "decoder.layers.mlp.linear_fc2.weight":
            path = directory / place.relative_path
            place.offset, place.length = path.stat().st_size, len(content.getvalue())
            path.write_bytes(path.read_bytes() + content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return change


def _cut(name: str) -> Callable[[Path], None]:
    return lambda directory: _write(name, (directory / name).read_bytes()[:-200])(directory)


def _remove(pattern: str) -> Callable[[Path], None]:
    return lambda directory: next(directory.glob(pattern)).unlink()


def _track(text: str) -> Callable[[Path], None]:
    return lambda directory: _write("../latest_checkpointed_iteration.txt", text.encode())(directory)


@pytest.mark.parametrize(
    "change, words",
    [
        (_cut(".metadata"), [".metadata", "cannot read it", "it is damaged, or a newer torch wrote it"]),
        (lambda directory: (directory / ".metadata").write_bytes(pickle.dumps(Evil(directory / "ran"))), [".metadata", "mkdir"]),
        (_remove(".metadata"), ["holds no .metadata"]),
        (_metadata(_drop_tensor), ["decoder.layers.0.mlp.linear_fc2.weight is missing"]),
        (_metadata(_add_tensor), ["decoder.layers.0.mlp.router.weight is left over"]),
        (_metadata(_many_layers), ["decoder.layers.mlp.linear_fc2.weight is [20000, 64, 96]", "none of layers"]),
        (_metadata(_point_outside), [".metadata", "../../x.distcp"]),
        (_metadata(_halve_pieces), ["decoder.layers.mlp.linear_fc2.weight is damaged", "hold 3072 of the 6144 numbers"]),
        (_metadata(_place_nothing), ["cannot be read from its table of contents", "damaged"]),
        (_metadata(_no_table), [".metadata is damaged"]),
        (_metadata(_no_size), [".metadata is damaged"]),
        (_evil_piece, ["decoder.layers.mlp.linear_fc2.weight cannot be read", "damaged (UnpicklingError)"]),
        (_write("__1_0.distcp", b""), ["__1_0.distcp: damaged"]),
        (_write("__1_0.distcp", b"\0" * 2000), ["__1_0.distcp: damaged"]),
        (_remove("__1_0.distcp"), [".metadata names __1_0.distcp, and there is no such file"]),
        (_cut("common.pt"), ["common.pt cannot be read"]),
        (_write("common.pt", b"no archive"), ["common.pt cannot be read"]),
        (_common(lambda content, _: content.pop("args")), ["does not say which model it holds", "run_config.yaml"]),
        (_common(lambda content, ran: content.update(args=Evil(ran))), ["does not say which model it holds"]),
        (_args(num_experts=8), ["(args): num_experts is 8"]),
        (_args(ffn_hidden_size=95), ["decoder.layers.0.mlp.linear_fc1.weight is [192, 64]", "[190, 64]"]),
        (_args(num_layers=4), ["num_layers is 4, and it holds 3 layers"]),
        (_args(num_layers=Path), ["num_layers is <pathlib.", "expected a value of type int"]),
        (_write("metadata.json", b'{"sharded_backend": "zarr"}'), ["metadata.json: sharded_backend is 'zarr'"]),
        (_write("metadata.json", b"{"), ["metadata.json cannot be read"]),
        (_remove("metadata.json"), ["holds no metadata.json"]),
        (_track("12x"), ["latest_checkpointed_iteration.txt holds '12x'"]),
        (_track("124"), ["names iter_0000124, and there is no such directory"]),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_source_is_refused_and_nothing_is_left(
    written: Written,
    tokenizer: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    words: list[str],
) -> None:
    shutil.copytree(written("stacked layers")[0], tmp_path / "source")
    change(tmp_path / "source" / "iter_0000123")
    message = refusal_here(capsys, "import", tmp_path / "source", "--from", "megatron", "--to", tmp_path / "out", *tokenizer)
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def refusal_here(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a conversion that is refused."""
    status, told = convert_here(capsys, *words)
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, told
    return lines[0]


def test_what_a_pickle_names_is_not_called(
    written: Written, tokenizer: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model beside a stranger's object is read as ever; the args say another padding than the rows have."""
    shutil.copytree(written("stacked layers")[0], tmp_path / "source")

    def change(content: dict[str, Any], ran: Path) -> None:
        content["rerun_state"] = [Evil(ran), {"a": Evil(ran)}]
        content["args"].timers = Evil(ran)
        content["args"].make_vocab_size_divisible_by = 8

    _common(change)(tmp_path / "source" / "iter_0000123")
    status, told = convert_here(
        capsys, "import", tmp_path / "source", "--from", "megatron", "--to", tmp_path / "out", *tokenizer
    )
    assert status == 0 and "8 x tensor_model_parallel_size 2 are 272 rows, not 384; is it this tokenizer?" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_tokenizer_is_needed_and_must_be_the_models(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("import", written("stacked layers")[0], "--from", "megatron", "--to", tmp_path / "out")
    assert "--from megatron needs --tokenizer-type" in refusal_here(capsys, *words)
    write_tokenizer(tmp_path / "tokenizer.json", [f"<{i}>" for i in range(200)])
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "tokenizer.json")
    assert "the model has rows for 384 ids, and the tokenizer has 457" in refusal_here(capsys, *words, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_an_export_over_something_is_refused(imported: Imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"OUT {tmp_path} exists" in refusal_here(
        capsys, "export", imported("stacked layers")[0], tmp_path, "--to", "megatron"
    )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_floating_point_numbers_are_refused() -> None:
    class Quantised:
        def sizes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
            return {
                "optimizer.state": ((2,), torch.int8),
                "decoder.layers.mlp.linear_fc1.weight": ((2, 3, 4), torch.float8_e4m3fn),
            }

    with pytest.raises(UserError, match="x: decoder.layers.mlp.linear_fc1.weight is float8_e4m3fn"):
        MegatronWeights(Quantised(), 3, "x")  # type: ignore[arg-type]
