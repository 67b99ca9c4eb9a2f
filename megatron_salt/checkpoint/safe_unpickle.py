"""Pickles that can only build what belongs in a checkpoint.

torch_dist's `.metadata` is a pickle: it is read by an unpickler that knows the few classes of torch's checkpoint metadata and
nothing else. Every other pickle in a checkpoint (`common.pt`, byte objects inside the shards) has to pass torch's weights_only
reader. megatron-core opens some of these files with the unrestricted reader, so `check_pickles` goes over all of them first:
a checkpoint from a stranger is refused before anything in it can run. No function here communicates.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_salt.checkpoint.integrity import METADATA
from megatron_salt.errors import UserError
from megatron_salt.small_files import read_small

COMMON = "common.pt"
"""Where megatron-core 0.16 looks for what is no tensor."""

_LARGEST_METADATA = 8 << 30
"""Bytes: hundreds of them a shard of a tensor, so above those of any model."""

_METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class Unreadable(UserError):
    """A pickle of another release of torch, or a broken one where checksums were not looked at first."""


class UnsafePickle(UserError):
    """A pickle asks for something that no checkpoint needs. Nothing of it was executed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafePickle(f"asks for {module}.{name}, which no checkpoint's metadata needs")


def read_metadata(directory: Path) -> Metadata:
    """torch_dist's table of contents, read without the power to run code. Raises UnsafePickle or Unreadable."""
    path = directory / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(read_small(path, _LARGEST_METADATA))).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}; it was not loaded") from None
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise Unreadable(f"{path}: torch {torch.__version__} cannot read it: {_in_one_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UnsafePickle(f"{path}: holds a {type(metadata).__name__}, not torch_dist metadata")
    return metadata


def check_pickles(directory: Path, names: Iterable[str]) -> Metadata:
    """Show that megatron-core may read this checkpoint: none of its pickles can do anything but build plain data.

    `names` are the files that the checkpoint consists of; metadata that points anywhere else is refused. Raises UnsafePickle.
    """
    names = set(names)
    metadata = read_metadata(directory)
    for index, place in (metadata.storage_data or {}).items():
        if place.relative_path not in names:
            raise UnsafePickle(
                f"{directory / METADATA}: points {index.fqn} to {place.relative_path}, no file of the checkpoint"
            )
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with open(directory / place.relative_path, "rb") as file:
                file.seek(place.offset)
                _check_plain(io.BytesIO(file.read(place.length)), f"{directory / place.relative_path} ({index.fqn})")
    if COMMON in names:
        held = _check_plain(io.BytesIO((directory / COMMON).read_bytes()), str(directory / COMMON))
        if held != {}:
            raise UnsafePickle(f"{directory / COMMON}: holds a {type(held).__name__}, and ours an empty dict")
    return metadata


def _check_plain(stream: io.BytesIO, where: str) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafePickle(f"{where}: {_in_one_line(error)}; it was not loaded") from None
    except Exception as error:
        raise Unreadable(f"{where}: torch {torch.__version__} cannot read it: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
