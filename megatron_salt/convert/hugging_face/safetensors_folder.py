"""A local directory of a model of Hugging Face's: its config.json, and its safetensors in one file or several with an index.

A stranger made the files. Names that leave the directory, shards that are absent, cut off or of another size, and tensors of a kind that
holds no weights are refused by name. A tensor's bytes are mapped only while it is read, so memory holds one tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_salt.errors import UserError
from megatron_salt.small_files import read_json, refuse_outside_names

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Kinds of weights that are read, by their name in safetensors."""


NO_WEIGHTS = re.compile(r"(\.rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias))$")
"""Buffers that old releases of transformers saved beside the weights: masks and frequencies, in dtypes of their own."""


def safetensors_library() -> ModuleType:
    """The library that reads and writes these files. Raises UserError that says how to install it."""
    try:
        import safetensors
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise UserError(
            "this needs safetensors, which is not installed: pip install 'megatron-salt[hf]', or pip install safetensors"
        ) from None
    return safetensors


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    """Its dtype, as safetensors names it."""


def read_config(directory: Path) -> Mapping[str, Any]:
    """The contents of config.json. Raises UserError."""
    path = directory / CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no {CONFIG}; give a directory that save_pretrained wrote, or a clone of a model"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


class SafetensorsFolder:
    """The tensors of a directory, by name."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers of all files. Raises UserError."""
        self.directory = directory
        self.places = _places(directory)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None where there is none of this name."""
        place = self.places.get(name)
        return None if place is None else place.shape

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it, as a copy in memory of its own."""
        safe_open = safetensors_library().safe_open
        with safe_open(self.places[name].file, framework="pt", device="cpu") as file:
            if rows is None:
                return file.get_tensor(name).clone()
            return file.get_slice(name)[rows].clone()

    def names(self) -> Collection[str]:
        """All names."""
        return self.places.keys()

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor."""
        return {name: DTYPES[place.kind] for name, place in self.places.items()}


def _places(directory: Path) -> dict[str, TensorPlace]:
    index, single = directory / INDEX, directory / SINGLE
    if os.path.lexists(index):
        return _places_of_index(index)
    if os.path.lexists(single):
        return _places_of_file(single)
    others = sorted(path.name for path in directory.glob("*.safetensors")) if directory.is_dir() else []
    if others:
        raise UserError(f"{directory} has {', '.join(others[:3])}, and no {INDEX}, which says what lies where")
    if any(directory.glob("*.bin")):
        new = f"{directory}-safetensors"
        raise UserError(
            f'{directory} holds pickles (*.bin), which are not opened, and no safetensors; convert it: python -c "from transformers import '
            f"AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer; Model.from_pretrained({str(directory)!r}, dtype='auto')"
            f'.save_pretrained({new!r}); Tokenizer.from_pretrained({str(directory)!r}).save_pretrained({new!r})"'
        )
    raise UserError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _places_of_index(path: Path) -> dict[str, TensorPlace]:
    try:
        content = read_json(path)
        names: dict[str, str] = dict(content["weight_map"])
        if not all(isinstance(file, str) for file in names.values()):
            raise ValueError("weight_map names something that is no file")
        refuse_outside_names(set(names.values()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    places: dict[str, TensorPlace] = {}
    for name in sorted(set(names.values())):
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{path} names {name}, and there is no such file")
        found = _places_of_file(file)
        places |= {
            tensor: place for tensor, place in found.items() if names.get(tensor, name) == name
        }  # a file may hold it too
    missing = sorted(name for name in names.keys() - places.keys() if not NO_WEIGHTS.search(name))
    if missing:
        raise UserError(
            f"{path} names {missing[0]}, which no file holds" + (f"; and {len(missing) - 1} more" if missing[1:] else "")
        )
    return places


def _places_of_file(path: Path) -> dict[str, TensorPlace]:
    library = safetensors_library()
    places = {}
    if not path.is_file():  # to open a FIFO would wait for ever
        raise UserError(f"{path} cannot be read: it is not a regular file, or a link to nothing")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict: it has no iterator)
                if NO_WEIGHTS.search(name):
                    continue
                part = file.get_slice(name)
                places[name] = TensorPlace(path, tuple(part.get_shape()), part.get_dtype())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except library.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    for name, place in places.items():
        if place.kind not in DTYPES:
            raise UserError(
                f"{path}: {name} is of kind {place.kind}: quantised weights are not read; give the original weights"
            )
    return places
