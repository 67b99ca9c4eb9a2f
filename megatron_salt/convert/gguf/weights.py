"""The tensors of a GGUF file under their names in transformers, as transformers has them.

llama.cpp stores some of them otherwise. The query and key rows of a llama file are permuted, so that the two halves that rotate together
lie side by side; here they are put back. GPT-2's linear weights are transposed. GPT-NeoX's qkv
rows are all queries, then keys, then values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.gguf.architectures import ROPE_FACTORS
from megatron_salt.convert.gguf.gguf_file import GgufFile, gguf_library
from megatron_salt.convert.parts import parts_of
from megatron_salt.convert.tensor_part import Shape
from megatron_salt.errors import UserError

Restore = Callable[[Tensor], Tensor]
"""From a tensor of a file to the tensor of transformers."""


class GgufWeights:
    """Tensors by their names in transformers. A tensor that the architecture does not have keeps its name in the file."""

    def __init__(self, file: GgufFile, foreign: ForeignModel, tied: bool) -> None:
        """tied: the output weight, if there is one, is a copy of the embedding. Raises UserError where a tensor is missing."""
        self._file, self._foreign = file, foreign
        self._names = _names_in_file(file, foreign)
        used = {*self._names.values(), ROPE_FACTORS, *(["output.weight"] if tied else [])}
        self._names |= {name: name for name in file.tensors if name not in used}

    def names(self) -> Collection[str]:
        """All names."""
        return self._names.keys()

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor in transformers; None where there is none of this name."""
        if name not in self._names:
            return None
        shape = self._file.tensors[self._names[name]].shape
        return shape[::-1] if self._transposed(self._names[name], shape) else shape

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor: float32 for a quantised one."""
        return {name: self._file.dtype(stored) for name, stored in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        stored = self._names[name]
        restore = _restore(stored, self._foreign)
        if restore is None:
            return self._file.read(stored, rows)
        whole = restore(self._file.read(stored))
        return whole if rows is None else whole[rows]

    def _transposed(self, stored: str, shape: Shape) -> bool:
        return self._foreign.architecture == "GPT2LMHeadModel" and stored.startswith("blk.") and len(shape) == 2


def _names_in_file(file: GgufFile, foreign: ForeignModel) -> dict[str, str]:
    """{name in transformers: name in the file} of every tensor of the architecture. Raises UserError where one is missing or misshapen."""
    library = gguf_library()
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    spelled = library.get_tensor_name_map(kinds[file.metadata["general.architecture"]], foreign.model.num_layers)
    names, wrong = {}, []
    for part in parts_of(foreign.architecture, foreign.model, foreign.vocabulary_size, foreign.context):
        for name, shape in part.sources:
            stored = _name_in_file(spelled, name)
            names[name] = stored
            if stored not in file.tensors:
                wrong.append(f"{stored} is missing")
            elif sorted(file.tensors[stored].shape) != sorted(shape):
                wrong.append(f"{stored} is {list(file.tensors[stored].shape)}, and the metadata makes it {list(shape)}")
    if wrong:
        raise UserError(f"{file.path}: {'; '.join(wrong[:4])}" + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    return names


def _name_in_file(spelled: Any, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{spelled.get_name(stem)}.{kind}"


def _restore(stored: str, foreign: ForeignModel) -> Restore | None:
    """How a tensor of the file becomes that of transformers. None: it is that."""
    model, kind = foreign.model, stored.split(".")[2] if stored.startswith("blk.") else ""
    if foreign.architecture == "LlamaForCausalLM" and kind in ("attn_q", "attn_k"):
        return partial(halves_apart, model.num_attention_heads if kind == "attn_q" else model.query_groups)
    if foreign.architecture == "GPT2LMHeadModel" and stored.startswith("blk."):
        return lambda tensor: tensor.t() if tensor.ndim == 2 else tensor
    if foreign.architecture == "GPTNeoXForCausalLM" and kind == "attn_qkv":
        return partial(by_head, model.num_attention_heads)
    return None


def halves_apart(heads: int, tensor: Tensor) -> Tensor:
    """Rows of queries or keys [heads * d, ...]: in each head the rows 0, 2, 4, ..., then 1, 3, 5, ..."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def by_head(heads: int, tensor: Tensor) -> Tensor:
    """Rows [3 * heads * d, ...] of all queries, all keys, all values: of each head its query, key and value."""
    return tensor.reshape(3, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
