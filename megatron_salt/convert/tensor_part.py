"""One tensor of a model as it lies in our checkpoint, and how it is joined of another program's tensors and split into them.

The rows of a qkv weight lie by query group: its query heads, its key head, its value head. The rows of a gated MLP's first weight are
the gate, then the value that it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_salt.config import ModelConfig

Shape = tuple[int, ...]
Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of one layer, or one outside of the layers: in our checkpoint, and as tensors of the other program."""

    key: str
    """Its key in a checkpoint."""
    layer: int | None
    """None: it belongs to no layer."""
    shape: Shape
    """Ours, without the axis of layers."""
    sources: tuple[tuple[str, Shape], ...]
    """(name, shape) of each tensor of the other program."""
    join: Join | None
    """Theirs to ours. None: the rows of ours are those of theirs, source after source, then zeros; so a few are converted at a time."""
    split: Callable[[Tensor], Sequence[Tensor]]
    """Ours to theirs."""


def copied(key: str, layer: int | None, name: str, shape: Shape) -> Part:
    return Part(
        key=key,
        layer=layer,
        shape=shape,
        sources=((name, shape),),
        join=None,
        split=lambda whole: [whole],
    )


def vocabulary_weight(key: str, name: str, model: ModelConfig, vocabulary_size: int) -> Part:
    """A weight with a row for each id: ours has rows of zeros at its end, so that tensor-parallel ranks get equal shares."""
    rows, width = model.padded_vocabulary_size(vocabulary_size), model.hidden_size
    return Part(
        key=key,
        layer=None,
        shape=(rows, width),
        sources=((name, (vocabulary_size, width)),),
        join=None,
        split=lambda whole: [whole[:vocabulary_size]],
    )


def transposed(key: str, layer: int, name: str, shape: Shape) -> Part:
    """GPT-2's linear layers hold the transposed weight."""
    return Part(
        key=key,
        layer=layer,
        shape=shape,
        sources=((name, shape[::-1]),),
        join=lambda tensors: tensors[0].t().contiguous(),
        split=lambda whole: [whole.t().contiguous()],
    )


def join_qkv(groups: int, tensors: Sequence[Tensor]) -> Tensor:
    """[q rows + 2 kv rows, ...] by query group, of query [H d, ...], key and value [G d, ...]."""
    by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def split_qkv(groups: int, heads: int, whole: Tensor) -> list[Tensor]:
    """The inverse of `join_qkv`: query, key and value."""
    by_group = whole.reshape(groups, -1, *whole.shape[1:])
    width = by_group.size(1) // (heads // groups + 2)
    sizes = [width * (heads // groups), width, width]
    return [tensor.flatten(0, 1).contiguous() for tensor in by_group.split(sizes, dim=1)]


def grouped(key: str, layer: int, names: Sequence[str], model: ModelConfig, columns: Shape) -> Part:
    """Queries, keys and values of a layer: weights (columns: (hidden size,)) or biases (columns: ())."""
    heads, groups, width = model.num_attention_heads, model.query_groups, model.head_width
    rows = (heads * width, groups * width, groups * width)
    return Part(
        key=key,
        layer=layer,
        shape=(sum(rows), *columns),
        sources=tuple((name, (size, *columns)) for name, size in zip(names, rows, strict=True)),
        join=partial(join_qkv, groups),
        split=partial(split_qkv, groups, heads),
    )


def one_under_the_other(key: str, layer: int, name: str, model: ModelConfig, columns: Shape) -> Part:
    """Queries of all heads, then keys, then values, in one tensor of theirs."""
    heads, groups, width = model.num_attention_heads, model.query_groups, model.head_width
    rows = [heads * width, groups * width, groups * width]
    return Part(
        key=key,
        layer=layer,
        shape=(sum(rows), *columns),
        sources=((name, (sum(rows), *columns)),),
        join=lambda tensors: join_qkv(groups, tensors[0].split(rows)),
        split=lambda whole: [torch.cat(split_qkv(groups, heads, whole))],
    )


def stacked(key: str, layer: int, names: Sequence[str], shape: Shape) -> Part:
    """Tensors of equal shape, one under the other."""
    each = (shape[0] // len(names), *shape[1:])
    return Part(
        key=key,
        layer=layer,
        shape=shape,
        sources=tuple((name, each) for name in names),
        join=None,
        split=lambda whole: whole.chunk(len(names)),
    )
