"""torch_dist files, written and read by one process, one tensor at a time. No torch.distributed.

megatron-core writes a checkpoint from the ranks that hold the model. A conversion has no ranks, and not the memory for a whole model.
torch's own writer asks for the data of one piece after the other, and its reader reads the stored pieces that were asked for. A key whose
tensors belong to layers has an axis of layers in front. No function here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_salt.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a tensor of the checkpoint, and how to get it."""

    key: str
    size: Shape
    """Of the whole tensor."""
    offsets: Shape
    shape: Shape
    """Of this piece."""
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Gives the piece, [shape] in the dtype."""


def write_tensors(directory: Path, pieces: Sequence[Piece], done: Callable[[Piece], None]) -> list[str]:
    """Write all pieces and `.metadata` into the directory, durably; `done` is called after each. Returns the names of the shards.

    Memory: one piece. Raises OSError, and what a piece's `load` raises.
    """
    writer = FileSystemWriter(str(directory), single_file_per_rank=True, sync_files=True, thread_count=1)
    planner = _Pieces(pieces, done)
    writer.set_up_storage_writer(is_coordinator=True)
    planner.set_up_planner({}, None, is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan(plans)
    try:
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
    except RuntimeError as error:
        raise _cause_of(error) from error
    writer.finish(metadata, [results])
    return sorted({place.storage_data.relative_path for place in results})


def _cause_of(error: RuntimeError) -> BaseException:
    """What ended a write: torch's zip file, once left, raises an error of its own over a full disk or Ctrl-C."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError | KeyboardInterrupt):
        cause = cause.__context__
    return cause or error


class _Pieces(SavePlanner):
    """torch's plan of a save whose pieces are made when they are written."""

    def __init__(self, pieces: Sequence[Piece], done: Callable[[Piece], None]) -> None:
        self._pieces = {MetadataIndex(piece.key, torch.Size(piece.offsets)): piece for piece in pieces}
        assert len(self._pieces) == len(pieces), "two pieces in one place"
        self._done = done
        self._last: Tensor | None = None

    def set_up_planner(self, state_dict: dict, storage_meta: object = None, is_coordinator: bool = False) -> None:
        """Nothing: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.size),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        if self._last is not None:
            # It is written. torch's writer keeps the last tensor of every key to the end of the file: together as large as a layer.
            self._last.untyped_storage().resize_(0)
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        self._last = tensor = piece.load().clone()  # the source may keep what it gave
        assert tuple(tensor.shape) == piece.shape and tensor.dtype == piece.dtype, (piece, tensor.shape, tensor.dtype)
        self._done(piece)
        return tensor


class TensorFiles:
    """The tensors of a torch_dist checkpoint. Its pickles must have been checked: see safe_unpickle.py."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self._directory, self._metadata = directory, metadata

    def sizes(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """{key: (size, dtype)} of every tensor."""
        entries = self._metadata.state_dict_metadata.items()
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }

    def row_ranges(self, key: str) -> list[tuple[int, int]]:
        """(first row, end) of the stored pieces of a tensor, ascending; all rows are in one of them."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        starts = sorted({chunk.offsets[0] for chunk in entry.chunks})
        return list(zip(starts, [*starts[1:], entry.size[0]], strict=True))

    def read(self, key: str, offsets: Shape, shape: Shape) -> Tensor:
        """A part of a tensor, from whatever pieces it was saved in. Memory: the part, and one stored piece.

        Raises UserError where the pieces do not make the part, or cannot be read.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        covered = sum(item.lengths.numel() for item in items)
        if covered != whole.numel():
            raise UserError(
                f"{self._directory}: {key} is damaged: its pieces hold {covered} of the {whole.numel()} numbers of {list(shape)}"
            )
        plan = LoadPlan(items)
        try:
            reader = FileSystemReader(str(self._directory))
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            reader.read_data(plan, _Into(plan, whole)).wait()
        except MemoryError:
            raise
        except Exception as error:  # torch finds damage in its own ways; weights_only lets no pickle run
            files = sorted({str(place.relative_path) for place in self._places(items)}) or ["its table of contents"]
            why = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged ({type(error).__name__})"
            raise UserError(f"{self._directory}: {key} cannot be read from {' and '.join(files[:3])}: {why}") from None
        return whole

    def _places(self, items: Sequence[ReadItem]) -> list[Any]:
        """Where the table of contents says that these pieces lie."""
        places = self._metadata.storage_data or {}
        return [places[item.storage_index] for item in items if item.storage_index in places]


class _Into(LoadPlanner):
    """torch's plan of a load that puts what is read into one tensor."""

    def __init__(self, plan: LoadPlan, whole: Tensor) -> None:
        self._plan, self._whole = plan, whole

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing: the tensor is known."""

    def create_local_plan(self) -> LoadPlan:
        return self._plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor, and the plan has tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._whole
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: `resolve_tensor` gave a view of the whole."""
