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

from megatron_salt.convert.parts import EMBEDDING, OUTPUT, Shape
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.errors import UserError

_NOT_THE_MODEL = re.compile(r"^(optimizer|chained_\d+|rng_state|rerun_state|opt_param_scheduler|common_state)\b|_extra_state")
"""Keys that belong to training, or to Transformer Engine's scales. They are never read."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LAYERS = "decoder.layers."
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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

    def rows(self) -> Shape | None:
        """Rows and columns of the embedding, padding included; None where there is none."""
        places = self._places.get(EMBEDDING)
        return None if places is None else places[0].shape

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
        if rows is None:
            return torch.cat([self._read(place, 0, place.shape[0]) for place in self._places[name]])
        assert len(self._places[name]) == 1, f"{name} is not read by rows"
        return self._read(self._places[name][0], rows.start, rows.stop)

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
    if key.startswith(_LAYERS) and len(shape) > 1:
        suffix = key.removeprefix(_LAYERS)
        return [(_name(layer, suffix), _Place(key, layer, shape[1:], dtype)) for layer in range(shape[0])]
    return [(key, _Place(key, None, shape, dtype))]


def _name(layer: int, suffix: str) -> str:
    for own, engine in _NORMS.items():
        if suffix.startswith(own):
            suffix = engine + suffix.removeprefix(own)
    return f"{_LAYERS}{layer}.{suffix}"
