"""Megatron's checkpoints that are damaged, foreign or malicious: one line, nothing left, and nothing of them runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_salt.checkpoint.safe_unpickle import read_metadata
from megatron_salt.convert.megatron.weights import MegatronWeights
from megatron_salt.errors import UserError
from tests.convert.megatron.conftest import Imported, Written, convert_here
from tests.convert.megatron.megatron_models import (
    write_tokenizer,
)


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
