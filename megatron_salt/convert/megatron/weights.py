"""The model's tensors of a torch_dist checkpoint, under the names of megatron-core's GPTModel.

One tensor may lie in several forms. Layers: one key with an axis of layers in front, or a key for each layer. Norms: under the names of
Transformer Engine's modules (linear_qkv.layer_norm_weight), or under their own (input_layernorm.weight). A gated MLP's first weight: whole,
or its two halves under two keys. `MegatronWeights` shows all as whole tensors of one layer, with Transformer Engine's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_salt.convert.parts import EMBEDDING, OUTPUT
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.convert.tensor_part import Shape
from megatron_salt.errors import UserError

_NOT_THE_MODEL = re.compile(r"^(optimizer|chained_|rng|rerun_|opt_param_scheduler|common_state|fp8\.)|_extra_state")
"""Keys that belong to training, or to the scales of FP8, in Megatron's checkpoints and in ours. They are never read."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LAYERS = "decoder.layers."
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_LAYERS = 10_000
"""No model has more: a damaged table of contents may say so."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor of one layer lies."""

    key: str
    layer: int | None
    """Its place on the axis of layers; None: the key has no such axis."""
    shape: Shape
    dtype: torch.dtype


class MegatronWeights:
    """The model's tensors: see import_weights.Source. Rows of the vocabulary beyond `vocabulary_size` are padding, and not shown."""

    def __init__(self, tensors: TensorFiles, vocabulary_size: int, where: str) -> None:
        """Raises UserError where a tensor of the model does not hold floating-point numbers that can be read."""
        self._tensors = tensors
        self._places: dict[str, list[_Place]] = {}
        for key, (shape, dtype) in sorted(tensors.sizes().items()):
            if _NOT_THE_MODEL.search(key):
                continue
            if dtype not in _FLOATS:
                raise UserError(
                    f"{where}: {key} is {str(dtype).removeprefix('torch.')}; float32, bfloat16 and float16 are read"
                )
            if key.startswith(_LAYERS) and not _LAYER.match(key) and (len(shape) < 2 or shape[0] > _MOST_LAYERS):
                raise UserError(f"{where}: {key} is {list(shape)}: its first axis is none of layers")
            for name, place in _places(key, shape, dtype):
                self._add(name, place)
        self._rows = {name: vocabulary_size for name in (EMBEDDING, OUTPUT) if name in self._places}

    def _add(self, name: str, place: _Place) -> None:
        half = re.search(r"\.linear_fc1\.(weight|bias)_([wv])$", name)
        if half is None:
            self._places[name] = [place]
        else:  # sorted keys: _v comes before _w, and the gate (_w) is the upper half
            self._places.setdefault(name[:-2], []).insert(0, place)

    def names(self) -> Collection[str]:
        """All names of the model's tensors."""
        return self._places.keys()

    def layers(self) -> int:
        """Number of the model's layers: one more than the largest number of a layer."""
        numbers = (_LAYER.match(name) for name in self._places)
        return 1 + max((int(found[1]) for found in numbers if found), default=-1)

    def rows(self) -> int:
        """Rows of the embedding, padding included; 0 where there is none."""
        places = self._places.get(EMBEDDING)
        return 0 if places is None else places[0].shape[0]

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor, without padding; None where there is none of this name."""
        places = self._places.get(name)
        if places is None:
            return None
        first, *rest = places[0].shape
        return (min(len(places) * first, self._rows.get(name, len(places) * first)), *rest)

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor."""
        return {name: places[0].dtype for name, places in self._places.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        start, parts = 0, []
        for place in self._places[name]:
            end = start + place.shape[0]
            first, last = (start, end) if rows is None else (max(start, rows.start), min(end, rows.stop))
            if first < last:
                parts.append(self._read(place, first - start, last - start))
            start = end
        return torch.cat(parts) if parts[1:] else parts[0]

    def _read(self, place: _Place, start: int, stop: int) -> Tensor:
        offsets, shape = (start, *(0 for _ in place.shape[1:])), (stop - start, *place.shape[1:])
        if place.layer is None:
            return self._tensors.read(place.key, offsets, shape)
        return self._tensors.read(place.key, (place.layer, *offsets), (1, *shape))[0]


def _places(key: str, shape: Shape, dtype: torch.dtype) -> list[tuple[str, _Place]]:
    """The tensors of one key: (name, place)."""
    found = _LAYER.match(key)
    if found is not None:
        return [(_name(int(found[1]), key[found.end() :]), _Place(key, None, shape, dtype))]
    if key.startswith(_LAYERS):
        suffix = key.removeprefix(_LAYERS)
        return [(_name(layer, suffix), _Place(key, layer, shape[1:], dtype)) for layer in range(shape[0])]
    return [(key, _Place(key, None, shape, dtype))]


def _name(layer: int, suffix: str) -> str:
    for own, engine in _NORMS.items():
        if suffix.startswith(own):
            suffix = engine + suffix.removeprefix(own)
    return f"{_LAYERS}{layer}.{suffix}"
