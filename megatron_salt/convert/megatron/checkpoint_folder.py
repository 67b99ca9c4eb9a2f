"""A torch_dist checkpoint of Megatron-LM or Megatron-Bridge: where it lies, and what it says beside tensors.

A root holds iter_* directories or `release`, and latest_checkpointed_iteration.txt names the last one. What is no tensor lies in common.pt;
from megatron-core 0.19 on it is an object in the shards. Megatron-Bridge describes the model in run_config.yaml, Megatron-LM in its args.
Nothing else is opened: neither optimizer nor random state nor extra state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_salt import yaml_core
from megatron_salt.checkpoint import safe_unpickle
from megatron_salt.checkpoint.async_writer import CORE_CONFIG
from megatron_salt.checkpoint.integrity import METADATA
from megatron_salt.convert.megatron.inert_unpickle import Arguments, read_inert
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.errors import UserError
from megatron_salt.small_files import LARGEST, one_line, read_json, read_small, refuse_outside_names

TRACKER = "latest_checkpointed_iteration.txt"
"""Of a root: the number of its last checkpoint, or `release`."""
RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's configuration of the run that saved."""
_COMMON_OBJECT = "common_state/shard_0_1"
"""Key of the object in which megatron-core keeps what is no tensor, from 0.19 on."""


@dataclass(frozen=True, kw_only=True)
class MegatronFolder:
    """An opened checkpoint of another program."""

    directory: Path
    """Of the tensors."""
    tensors: TensorFiles
    arguments: Mapping[str, Any] | None
    """Megatron-LM's args; None where there are none."""
    provider: Mapping[str, Any] | None
    """The model in Megatron-Bridge's run_config.yaml; None where there is none."""


def open_folder(source: Path) -> MegatronFolder:
    """Read what a checkpoint says beside tensors. source: a root, or the directory of one checkpoint. Raises UserError."""
    directory = _directory_of(source)
    config = directory / CORE_CONFIG
    try:
        backend = dict(read_json(config)).get("sharded_backend")
    except OSError:
        raise UserError(
            f"{directory} holds no {CORE_CONFIG}: it is no torch_dist checkpoint (--ckpt-format torch_dist)"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from None
    if backend != "torch_dist":
        raise UserError(f"{config}: sharded_backend is {one_line(repr(backend))}; only torch_dist is read")
    metadata = _metadata(directory)
    common = _common(directory, metadata)
    arguments = common.get("args") if isinstance(common, dict) else None
    return MegatronFolder(
        directory=directory,
        tensors=TensorFiles(directory, metadata),
        arguments=vars(arguments) if isinstance(arguments, Arguments) else None,
        provider=_provider(directory / RUN_CONFIG),
    )


def _directory_of(source: Path) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is not a directory; give a directory of checkpoints, or one iter_* directory in it")
    if (source / METADATA).exists() or (source / CORE_CONFIG).exists():
        return source
    tracker = source / TRACKER
    try:
        last = read_small(tracker, 100).decode().strip()
    except OSError:
        raise UserError(
            f"{source} holds neither {METADATA} nor {TRACKER}; give one iter_* directory of torch_dist files"
        ) from None
    except ValueError as error:
        raise UserError(f"{tracker} cannot be read: {error}") from None
    if last != "release" and not (last.isascii() and last.isdecimal()):
        raise UserError(f"{tracker} holds {one_line(repr(last))}, neither a number nor release")
    directory = source / ("release" if last == "release" else f"iter_{int(last):07d}")
    if not directory.is_dir():
        raise UserError(f"{tracker} names {directory.name}, and there is no such directory")
    return directory


def _metadata(directory: Path) -> Metadata:
    """The table of contents. Raises UserError where it cannot be read, or names a file that is not there."""
    if not (directory / METADATA).is_file():
        raise UserError(f"{directory} holds no {METADATA}: it is no whole torch_dist checkpoint")
    try:
        metadata = safe_unpickle.read_metadata(directory)
    except safe_unpickle.Unreadable as error:
        raise UserError(f"{error}; it is damaged, or a newer torch wrote it") from None
    if not _well_formed(metadata):
        raise UserError(f"{directory / METADATA} is damaged: it is no table of tensors and of where they lie")
    names = {place.relative_path for place in (metadata.storage_data or {}).values()}
    try:
        refuse_outside_names(names)
    except ValueError as error:
        raise UserError(f"{directory / METADATA}: {error}") from None
    absent = sorted(name for name in names if not (directory / name).is_file())
    if absent:
        raise UserError(f"{directory / METADATA} names {absent[0]}, and there is no such file")
    return metadata


def _well_formed(metadata: Any) -> bool:
    """Whether the table of contents has the types that it declares: a pickle can put anything anywhere."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data or {}
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return False
    for key, entry in entries.items():
        if not isinstance(key, str):
            return False
        if isinstance(entry, TensorStorageMetadata) and not (
            isinstance(entry.size, torch.Size)
            and isinstance(entry.properties, TensorProperties)
            and isinstance(entry.chunks, list)
            and all(isinstance(chunk, ChunkStorageMetadata) for chunk in entry.chunks)
            and all(len(chunk.offsets) == len(chunk.sizes) == len(entry.size) for chunk in entry.chunks)
        ):
            return False
    return all(
        isinstance(place, _StorageInfo)
        and isinstance(place.relative_path, str)
        and type(place.offset) is int
        and type(place.length) is int
        for place in places.values()
    )


def _common(directory: Path, metadata: Metadata) -> Any:
    """What the checkpoint holds beside tensors; {} where it holds nothing."""
    path = directory / safe_unpickle.COMMON
    if path.is_file():
        with open(path, "rb") as file:
            return read_inert(file, str(path))
    place = (metadata.storage_data or {}).get(MetadataIndex(_COMMON_OBJECT))
    if place is None:
        return {}
    path = directory / place.relative_path
    where = f"{path} ({_COMMON_OBJECT})"
    if not 0 <= place.length <= LARGEST or place.offset < 0:
        raise UserError(f"{where}: {place.length} bytes at {place.offset}, more than are read of such an object")
    with open(path, "rb") as file:
        file.seek(place.offset)
        found = read_inert(io.BytesIO(file.read(place.length)), where)
    return found[0] if isinstance(found, list) and found else {}


def _provider(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = yaml_core.load(read_small(path, LARGEST).decode())
        model = config["model"] if isinstance(config, dict) else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(model, dict):
        raise UserError(f"{path} holds no model")
    return model
