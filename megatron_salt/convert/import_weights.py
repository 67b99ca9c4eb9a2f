"""From the tensors of another program to pieces of a checkpoint of ours, one at a time.

Every tensor that the architecture has must be there, with its shape, and none may be left over. Numbers that are not finite are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.parts import EMBEDDING, parts_of
from megatron_salt.convert.tensor_files import Piece
from megatron_salt.convert.tensor_part import Join, Part, Shape
from megatron_salt.errors import UserError

PIECE_BYTES = 64 << 20
"""Rows are converted a few at a time: so many bytes of ours."""


class Source(Protocol):
    """Tensors of another program."""

    def names(self) -> Collection[str]:
        """All names."""
        ...

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor; None where there is none of this name."""
        ...

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        ...


def choose_dtype(dtypes: Mapping[str, torch.dtype], wanted: torch.dtype | None, where: str) -> torch.dtype:
    """The dtype of the converted tensors: `wanted`, else the one that they have. Raises UserError where that is not float32 or bfloat16."""
    if wanted is not None:
        return wanted
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    if kinds in (["float32"], ["bfloat16"]):
        return torch.float32 if kinds == ["float32"] else torch.bfloat16
    raise UserError(
        f"{where} holds {' and '.join(kinds)}; say with --dtype float32 or --dtype bfloat16 what the checkpoint shall hold"
    )


def pieces_of(source: Source, foreign: ForeignModel, dtype: torch.dtype, where: str) -> list[Piece]:
    """The pieces of the checkpoint. Reads no weights, but those of an output layer that should equal the embedding.

    `where` names the source. Raises UserError where a tensor is missing, left over or of another shape; later, when a piece is loaded,
    where it is not finite.
    """
    model = foreign.model
    if model.num_layers > len(source.names()):
        raise UserError(f"{where}: {model.num_layers} layers, and it holds {len(source.names())} tensors")
    parts = list(parts_of(foreign.architecture, model, foreign.vocabulary_size, foreign.context))
    prefix = _prefix_left_out(source, parts)
    wrong, used = [], set()
    for part in parts:
        for name, shape in part.sources:
            used.add(name.removeprefix(prefix))
            present = source.shape(name.removeprefix(prefix))
            if present is None:
                wrong.append(f"{name} is missing")
            elif present != shape:
                wrong.append(f"{name} is {list(present)}, and the model's configuration makes it {list(shape)}")
    left = sorted(set(source.names()) - used)
    if not model.untie_embeddings_and_output_weights:
        left = _without_tied_copy(source, parts, prefix, left, where)
    wrong += [f"{name} is left over: this architecture has no such tensor" for name in left]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where}: {'; '.join(wrong[:4])}{more}")
    return [piece for part in parts for piece in _pieces(source, part, model.num_layers, dtype, prefix, where)]


def _prefix_left_out(source: Source, parts: list[Part]) -> str:
    """The prefix of all names in this architecture that a model which was saved without its head lacks; "" where it has it."""
    prefix = parts[0].sources[0][0].split(".")[0] + "."
    return "" if any(name.startswith(prefix) for name in source.names()) else prefix


def _without_tied_copy(source: Source, parts: list[Part], prefix: str, left: list[str], where: str) -> list[str]:
    """`left` without an output weight that equals the embedding, which some programs save twice. Raises UserError where it differs."""
    embedding = next(part for part in parts if part.key == EMBEDDING).sources[0][0].removeprefix(prefix)
    for name in left:
        if name not in ("lm_head.weight", "embed_out.weight"):
            continue
        if source.shape(name) == source.shape(embedding) and all(
            torch.equal(source.read(name, rows), source.read(embedding, rows)) for rows in _row_slices(source.shape(name), 4)
        ):
            return [other for other in left if other != name]
        raise UserError(f"{where}: tie_word_embeddings is true, and {name} differs from {embedding}")
    return left


def _row_slices(shape: Shape | None, itemsize: int) -> Iterator[slice]:
    """All rows of a tensor, in slices of about `PIECE_BYTES`."""
    assert shape is not None
    step = max(1, PIECE_BYTES // (itemsize * max(1, math.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _pieces(source: Source, part: Part, num_layers: int, dtype: torch.dtype, prefix: str, where: str) -> Iterator[Piece]:
    """One piece, or several of a part's rows."""
    names = [name.removeprefix(prefix) for name, _ in part.sources]
    zeros = tuple(0 for _ in part.shape[1:])

    def piece(first: int, rows: int, load: Callable[[], Tensor]) -> Piece:
        shape = (rows, *part.shape[1:])
        if part.layer is None:
            return Piece(key=part.key, size=part.shape, offsets=(first, *zeros), shape=shape, dtype=dtype, load=load)
        size, offsets = (num_layers, *part.shape), (part.layer, first, *zeros)
        return Piece(key=part.key, size=size, offsets=offsets, shape=(1, *shape), dtype=dtype, load=lambda: load()[None])

    if part.join is not None:
        yield piece(0, part.shape[0], partial(_load, source, part.join, names, dtype, where))
        return
    end = 0
    for name, (_, shape) in zip(names, part.sources, strict=True):
        for rows in _row_slices(shape, dtype.itemsize):
            yield piece(end + rows.start, rows.stop - rows.start, partial(_load_rows, source, name, rows, dtype, where))
        end += shape[0]
    for rows in _row_slices((part.shape[0] - end, *part.shape[1:]), dtype.itemsize):
        padding = (rows.stop - rows.start, *part.shape[1:])
        yield piece(end + rows.start, padding[0], partial(torch.zeros, padding, dtype=dtype))


def _load(source: Source, join: Join, names: list[str], dtype: torch.dtype, where: str) -> Tensor:
    return join([converted(source.read(name), dtype, name, where) for name in names]).contiguous()


def _load_rows(source: Source, name: str, rows: slice, dtype: torch.dtype, where: str) -> Tensor:
    return converted(source.read(name, rows), dtype, name, where)


def converted(tensor: Tensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    """The tensor in the dtype. Raises UserError where it has numbers that are not finite, or too large for the dtype."""
    rounded = tensor.to(dtype)
    if not all_finite(rounded):
        kind = str(dtype).removeprefix("torch.")
        what = f"too large for {kind}" if all_finite(tensor) else "that are not finite"
        raise UserError(f"{where}: {name} has numbers {what}")
    return rounded


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. Memory: none of the tensor's size, as torch.isfinite would take."""
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor)  # NaN where there is one
    return math.isfinite(smallest) and math.isfinite(largest)
