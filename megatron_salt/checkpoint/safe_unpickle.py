"""Reading the pickles of a checkpoint without running code from them.

torch_dist's `.metadata` is a pickle. It is read by an unpickler that knows only the few classes of torch's checkpoint metadata. Every other
pickle in a checkpoint (`common.pt`, byte objects inside the shards) must pass torch's weights_only reader. megatron-core opens some of
these files with the unrestricted reader, so `check_pickles` reads all of them first: a stranger's checkpoint is refused before anything
in it can run. No function here communicates.
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
"""The file in which megatron-core 0.16 looks for everything that is no tensor."""

_LARGEST_METADATA = 8 << 30
"""Bytes. A shard of a tensor takes some hundreds, so no model needs more."""

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
    """A pickle that another release of torch wrote, or, where checksums were not verified before, a damaged one."""


class UnsafePickle(UserError):
    """A pickle that asks for something that no checkpoint needs. None of it was executed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafePickle(f"asks for {module}.{name}, which no checkpoint's metadata needs")


def read_metadata(directory: Path) -> Metadata:
    """torch_dist's table of contents, read without running code. Raises UnsafePickle or Unreadable."""
    path = directory / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(read_small(path, _LARGEST_METADATA))).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}; it was not loaded") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise Unreadable(f"{path}: torch {torch.__version__} cannot read it: {_in_one_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UnsafePickle(f"{path}: holds a {type(metadata).__name__}, not torch_dist metadata")
    return metadata


def check_pickles(directory: Path, names: Iterable[str]) -> Metadata:
    """Check that none of a checkpoint's pickles can do anything but build plain data, so that megatron-core may read them.

    names: the checkpoint's files; metadata that points to any other file is refused. Raises UnsafePickle or Unreadable.
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
        common = _check_plain(io.BytesIO((directory / COMMON).read_bytes()), str(directory / COMMON))
        if common != {}:
            raise UnsafePickle(f"{directory / COMMON}: holds a {type(common).__name__}, and ours an empty dict")
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
