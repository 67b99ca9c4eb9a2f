"""Reading the pickles of a checkpoint without running code from them.

torch_dist's `.metadata` is a pickle. It is read by an unpickler that knows only the few classes of torch's checkpoint metadata. Every other
pickle in a checkpoint (`common.pt`, byte objects inside the shards) must pass torch's weights_only reader. megatron-core opens some of
these files with the unrestricted reader, so `check_pickles` reads all of them first: a stranger's checkpoint is refused before anything
in it can run. No function here communicates.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
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


def _opcodes(*sizes: int) -> bytes:
    """The opcodes whose argument has one of these sizes, in bytes, or in pickletools' words for another kind."""
    found = (opcode.code for opcode in pickletools.opcodes if (0 if opcode.arg is None else opcode.arg.n) in sizes)
    return "".join(code for code in found if code not in ".\x95pr").encode("latin-1")


def _class_of(*sizes: int) -> bytes:
    return b"[" + re.escape(_opcodes(*sizes)) + b"]"


_OF_FIXED_SIZE = re.compile(
    b"(?:" + _class_of(0) + b"++|" + b"|".join(_class_of(size) + b".{%d}" % size for size in (1, 2, 4, 8)) + b")*+", re.DOTALL
)
"""Opcodes of fixed size, without STOP, FRAME and those that put at any place of the memo."""
_LINES = {code: 2 if chr(code) in "ci" else 1 for code in _opcodes(pickletools.UP_TO_NEWLINE)} | {ord("p"): 1}
_COUNTS = {
    code: size
    for size, kind in ((1, pickletools.TAKEN_FROM_ARGUMENT1), (4, pickletools.TAKEN_FROM_ARGUMENT4),
                       (4, pickletools.TAKEN_FROM_ARGUMENT4U), (8, pickletools.TAKEN_FROM_ARGUMENT8U))
    for code in _opcodes(kind)
}  # fmt: skip
_STOP, _FRAME, _PUT, _LONG_BINPUT = b".\x95pr"


def refuse_memory_bomb(content: bytes) -> None:
    """Raise UnsafePickle where a pickle puts an object at a place of its memo that it cannot have reached: Python's unpickler makes a table
    as long as the place, and the largest has 2^32. Raises ValueError for what is no pickle. Nothing is built.

    Each object in the memo takes two bytes of the file at least, that which makes it and that which puts it there.
    """
    at, end = 0, len(content)
    while True:
        match = _OF_FIXED_SIZE.match(content, at, end)
        assert match is not None
        at = match.end()
        if at == end < len(content):  # of a frame
            end = len(content)
            continue
        code = content[at] if at < end else None
        if code == _STOP:
            return
        if code == _FRAME and end == len(content):
            at, end = at + 9, at + 9 + int.from_bytes(content[at + 1 : at + 9], "little")
            after = at
        elif code == _LONG_BINPUT:
            place, after = int.from_bytes(content[at + 1 : at + 5], "little"), at + 5
            _refuse_place(place, at)
        elif code in _LINES:
            after = at + 1
            for _ in range(_LINES[code]):
                after = content.find(b"\n", after, end) + 1 or end + 1
            if code == _PUT and after <= end:
                _refuse_place(int(content[at + 1 : after]), at)
        elif code in _COUNTS:
            start = at + 1 + _COUNTS[code]
            after = start + int.from_bytes(content[at + 1 : start], "little")
        else:
            raise ValueError(f"byte {at} of {len(content)} is no opcode of a pickle")
        # An unpickler that reads past the end of a frame goes on at another place than this.
        if after > end or end > len(content):
            raise ValueError(f"byte {at} of {len(content)} has an opcode that is cut off")
        at = after


def _refuse_place(place: int, at: int) -> None:
    if not 0 <= place <= at // 2:
        raise UnsafePickle(f"byte {at} asks for place {place} of the memo, which a pickle cannot have reached there")


def read_metadata(directory: Path) -> Metadata:
    """torch_dist's table of contents, read without running code. Raises UnsafePickle or Unreadable."""
    path = directory / METADATA
    try:
        content = read_small(path, _LARGEST_METADATA)
        refuse_memory_bomb(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
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
