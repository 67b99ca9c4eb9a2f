"""Tensors of another program as pieces: each lies in one place, small, and together they are what the whole tensors would make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_salt.checkpoint import safe_unpickle
from megatron_salt.config import ModelConfig
from megatron_salt.convert import import_weights
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.hugging_face.export_directory import _write_weights
from megatron_salt.convert.import_weights import all_finite, pieces_of
from megatron_salt.convert.parts import parts_of
from megatron_salt.convert.tensor_files import Piece, TensorFiles, write_tensors
from megatron_salt.convert.tensor_part import Part
from megatron_salt.errors import UserError
from tests.convert.test_families import GPT2, LLAMA, NEOX

IDS, CONTEXT = 261, 128
SMALL = 2048
"""Bytes of a piece."""


class Tensors:
    """A source in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


MODELS = {
    "LlamaForCausalLM": replace(LLAMA, disable_bias_linear=False),
    "Qwen2ForCausalLM": replace(LLAMA, add_qkv_bias=True, untie_embeddings_and_output_weights=False),
    "GPTNeoXForCausalLM": NEOX,
    "GPT2LMHeadModel": GPT2,
}


def random_source(parts: list[Part]) -> Tensors:
    torch.manual_seed(0)
    return Tensors({name: torch.randn(shape) for part in parts for name, shape in part.sources})


def foreign(architecture: str, model: ModelConfig) -> ForeignModel:
    return ForeignModel(architecture=architecture, model=model, vocabulary_size=IDS, context=CONTEXT)


def whole(part: Part, source: Tensors) -> Tensor:
    """A tensor of ours, of whole tensors of the source."""
    tensors = [source.read(name) for name, _ in part.sources]
    if part.join is not None:
        return part.join(tensors)
    stacked = torch.cat(tensors)
    return torch.cat([stacked, torch.zeros(part.shape[0] - len(stacked), *part.shape[1:])])


@pytest.mark.parametrize("architecture", MODELS)
def test_small_pieces_make_the_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """On disk too, where they are read as a whole and by the ranges in which they were stored. Memory has one piece at a time."""
    model = MODELS[architecture]
    parts = list(parts_of(architecture, model, IDS, CONTEXT))
    source = random_source(parts)
    monkeypatch.setattr(import_weights, "PIECE_BYTES", SMALL)
    pieces = pieces_of(source, foreign(architecture, model), torch.float32, "x")
    joined = {part.key for part in parts if part.join is not None}
    assert all(4 * math.prod(piece.shape) <= SMALL for piece in pieces if piece.key not in joined)
    cloned: list[Tensor] = []
    clone = Tensor.clone

    def watched(tensor: Tensor) -> Tensor:
        cloned.append(clone(tensor))
        return cloned[-1]

    def done(piece: Piece) -> None:
        assert [tensor.untyped_storage().nbytes() > 0 for tensor in cloned].count(True) == 1, (
            "an earlier piece is still in memory"
        )

    monkeypatch.setattr(Tensor, "clone", watched)
    write_tensors(tmp_path, pieces, done)
    monkeypatch.undo()
    assert len(cloned) == len(pieces)
    files = TensorFiles(tmp_path, safe_unpickle.read_metadata(tmp_path))
    for part in parts:
        expected, zeros = whole(part, source), tuple(0 for _ in part.shape)
        if part.layer is not None:
            assert torch.equal(files.read(part.key, (part.layer, *zeros), (1, *part.shape))[0], expected)
            assert all(
                torch.equal(*pair) for pair in zip(part.split(expected), map(source.read, dict(part.sources)), strict=True)
            )
            continue
        ranges = files.row_ranges(part.key)
        assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == part.shape[0]
        rows = [files.read(part.key, (first, *zeros[1:]), (end - first, *part.shape[1:])) for first, end in ranges]
        assert torch.equal(torch.cat(rows), expected)


def test_numbers_that_the_dtype_cannot_hold_are_refused() -> None:
    model = MODELS["GPTNeoXForCausalLM"]
    source = random_source(list(parts_of("GPTNeoXForCausalLM", model, IDS, CONTEXT)))
    for value, dtype, words in ((3.4e38, torch.bfloat16, "too large for bfloat16"), (math.inf, torch.float32, "not finite"),
                                (math.nan, torch.bfloat16, "not finite"), (1e300, torch.float32, "too large for float32")):  # fmt: skip
        for name in ("gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.query_key_value.weight"):
            tensor = source.tensors[name].double()
            tensor[3, 5] = value
            changed = Tensors(source.tensors | {name: tensor})
            with pytest.raises(UserError, match=f"x: {name} has numbers (that are )?{words}"):
                for piece in pieces_of(changed, foreign("GPTNeoXForCausalLM", model), dtype, "x"):
                    piece.load()


def test_an_export_refuses_numbers_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    parts = list(parts_of("LlamaForCausalLM", LLAMA, IDS, CONTEXT))
    source = random_source(parts)
    source.tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = 3.4e38
    write_tensors(tmp_path, pieces_of(source, foreign("LlamaForCausalLM", LLAMA), torch.float32, "x"), lambda piece: None)
    files = TensorFiles(tmp_path, safe_unpickle.read_metadata(tmp_path))
    _write_weights(tmp_path, parts, files, torch.float32, 10**9, "x")
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())
    with pytest.raises(UserError, match="x: decoder.layers.mlp.linear_fc1.weight has numbers too large for bfloat16"):
        _write_weights(tmp_path, parts, files, torch.bfloat16, 10**9, "x")


def test_all_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        good = torch.tensor([torch.finfo(dtype).max, -0.0, torch.finfo(dtype).min], dtype=dtype)
        assert all_finite(good) and all_finite(good[:0])
        for bad in (math.nan, math.inf, -math.inf):
            assert not all_finite(torch.cat([good, torch.tensor([bad], dtype=dtype)]))


def test_more_layers_than_tensors_are_refused_before_they_are_listed() -> None:
    model = replace(LLAMA, num_layers=10**9)
    with pytest.raises(UserError, match=r"x: 1000000000 layers, and it holds 3 tensors"):
        pieces_of(Tensors({name: torch.zeros(1) for name in "abc"}), foreign("LlamaForCausalLM", model), torch.float32, "x")
