"""Model and optimizer as megatron-core's sharded state, and that state on its way to and from disk (torch_dist).

Only tensors are saved. A parameter group takes nothing from a checkpoint but its `step`; everything else in it comes from the flags and
the schedule. So no pickled object is written, and `common.pt` is empty. Keys are GPTModel's. Optimizer state has one of three forms:
- `dp_reshardable`: megatron-core's buckets as they lie in memory. No communication. Loads under any data- and context-parallel size
  while tp, pp and the split into chunks and buckets stay.
- `fully_reshardable`: shaped like the parameters. Loads under any layout. Every data- and context-parallel rank gathers the state of its
  group in host memory (12 bytes for each parameter of its tp and pp share).
- `plain`: without the distributed optimizer. Loads under any layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_salt.checkpoint.run_state import OptimizerForm
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mcore_compat import quiet_checkpointing
from megatron_salt.parallel.mesh import Mesh

State = dict[str, Any]
"""Nested dicts and lists whose leaves are megatron-core's ShardedTensor, ShardedTensorFactory and LocalNonpersistentObject."""


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model itself inside DDP and Float16Module."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


@contextmanager
def settled(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Complete all parameters for the time of the block. Collective over the data-parallel ranks.

    Under --overlap-param-gather a rank has new values only for its own shard between a step and the next forward.
    """
    wrapped = [chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel)]
    waiting = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    for chunk in waiting:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()


# ---- what is saved -----------------------------------------------------------------------------------------------------


def chunk_keys(num_chunks: int) -> list[str]:
    """Megatron's names for the model chunks of a rank."""
    return ["model"] if num_chunks == 1 else [f"model{number}" for number in range(num_chunks)]


def model_state(chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> State:
    """The sharded parameters and buffers of this rank's chunks, under "model", or "model0", "model1"... when interleaved."""
    metadata = {"dp_cp_group": groups.dp_cp}
    states = {}
    for key, chunk in zip(chunk_keys(len(chunks)), chunks, strict=True):
        model: Any = unwrapped(chunk)
        states[key] = _without_extra_state(model.sharded_state_dict(metadata=metadata))
    return states


def optimizer_state(optimizer: MegatronOptimizer, model: State, form: OptimizerForm, is_loading: bool) -> State:
    """The sharded optimizer state that goes with `model_state`. Form fully_reshardable is collective over dp and cp."""
    if not is_loading:
        _allocate(optimizer)
    model_part = model["model"] if set(model) == {"model"} else model
    with _gathered_positions(optimizer) if form == "fully_reshardable" else nullcontext():
        state = optimizer.sharded_state_dict(model_part, is_loading=is_loading, metadata={"distrib_optim_sharding_type": form})
    return _tensors_only(state)


@contextmanager
def _gathered_positions(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Take the padding at the ends of buckets out of the positions in every buffer's index of parameters, for the time of the block.

    megatron-core gathers a buffer without that padding (`get_parameter_state_dp_zero`). Then it cuts parameters out of it at positions
    that include the padding (`sharded_param_state_fully_reshardable`), so from the second bucket on it would save shifted values.
    """
    buffers = [buffer for part in _parts(optimizer) if isinstance(part, DistributedOptimizer) for buffer in part.buffers]
    indices = [buffer.param_index_map for buffer in buffers]
    for buffer, index in zip(buffers, indices, strict=True):
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = list(accumulate(padding, initial=0))
        buffer.param_index_map = {
            param: (start - before[bucket], end - before[bucket], bucket) for param, (start, end, bucket) in index.items()
        }
    yield
    for buffer, index in zip(buffers, indices, strict=True):
        buffer.param_index_map = index


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """The number of updates that the optimizer has made. Groups without parameters on this rank do not count."""
    groups = [group for part in _parts(optimizer) for group in part.optimizer.param_groups]
    steps = {group["step"] for group in groups if group["params"] and "step" in group}
    assert len(steps) <= 1, f"parameter groups disagree on the step: {sorted(steps)}"
    return int(steps.pop()) if steps else 0


@torch.no_grad()  # megatron-core copies into main parameters, and does not guard that in form dp_reshardable
def load_optimizer(optimizer: MegatronOptimizer, loaded: State, step: int) -> None:
    """Give the optimizer what `load` returned for it, and its step."""
    optimizer.load_state_dict(loaded)
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            group.pop("step", None)
            if step:
                group["step"] = step


def form_for(optimizer: MegatronOptimizer, reshardable: bool) -> OptimizerForm:
    """The form in which this rank can save: see the module's docstring. Ranks may differ; `dp_reshardable` needs all of them.

    A data-parallel rank whose share of some bucket is nothing but padding cannot describe it in buckets (tiny models).
    """
    shards = [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]
    if not shards:
        return "plain"
    buffers = [buckets for part in shards for buffer in part.gbuf_ranges for buckets in buffer.values()]
    whole = all(bucket["param_map"] for buckets in buffers for bucket in buckets)
    return "dp_reshardable" if whole and not reshardable else "fully_reshardable"


def bucket_plan(chunks: Sequence[nn.Module], model: State) -> str:
    """A hash of the positions of all parameters in this rank's buckets. Two runs must share it to share state in form dp_reshardable."""
    keys = {
        id(leaf.data): (leaf.key, getattr(leaf, "global_offset", ()))
        for leaf in nested_values(model)
        if isinstance(leaf, (ShardedTensor, ShardedTensorFactory))
    }
    plan = [
        [[*keys[id(param)], start - buffer.buckets[bucket].offset, end - buffer.buckets[bucket].offset, bucket]
         for param, (start, end, bucket) in buffer.param_index_map.items()]
        for chunk in chunks if isinstance(chunk, DistributedDataParallel) for buffer in chunk.buffers
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]


def common_form(form: OptimizerForm) -> OptimizerForm:
    """The form that every rank can save in. Collective over all ranks."""
    forms: list[OptimizerForm] = [form] * dist.get_world_size()
    dist.all_gather_object(forms, form)
    return "fully_reshardable" if "fully_reshardable" in forms else form


def all_bucket_plans(plan: str, mesh: Mesh) -> dict[str, str]:
    """Every model-parallel rank's `bucket_plan`, by `model_parallel_place`. Collective over all ranks."""
    plans: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(plans, (model_parallel_place(mesh), plan))
    return dict(plans)


def model_parallel_place(mesh: Mesh) -> str:
    """The name of this rank's part of the model: "pp0.tp0" and so on."""
    return f"pp{mesh.at.pp}.tp{mesh.at.tp}"


def rng_state(vector: torch.Tensor, layout: Layout, rank: int) -> ShardedTensor:
    """This rank's vector of random state, as its part of one tensor [pp, tp, cp, dp, bytes] of the checkpoint."""
    at = layout.coordinates(rank)
    places = [(at.pp, layout.pipeline), (at.tp, layout.tensor), (at.cp, layout.context), (at.dp, layout.data)]
    return ShardedTensor.from_rank_offsets(
        "rng", vector.view(1, 1, 1, 1, -1), *((axis, place, size) for axis, (place, size) in enumerate(places)), replica_id=0
    )


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Make moments of zeros where no step has been made yet: megatron-core cannot describe an optimizer without moments."""
    for part in _parts(optimizer):
        if part.optimizer.state:
            continue
        if isinstance(part, DistributedOptimizer):
            part.load_state_dict(part.state_dict())  # allocates, and leaves the contents undefined
        else:
            part.init_state_fn(part.optimizer, part.config)
        for moments in part.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()


def _tensors_only(state: Any) -> Any:
    """`state` with every object that is no tensor kept on this rank, and padding blanked."""
    if isinstance(state, dict):
        padding = state.get("padding")  # in form dp_reshardable: whether a piece of a bucket holds no parameter
        if isinstance(padding, LocalNonpersistentObject) and padding.unwrap():
            state = {key: _blank(value) if isinstance(value, ShardedTensor) else value for key, value in state.items()}
        return {key: _tensors_only(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_tensors_only(value) for value in state]
    if isinstance(state, (ShardedTensor, ShardedTensorFactory, LocalNonpersistentObject)):
        return state
    return LocalNonpersistentObject(state.data if isinstance(state, ShardedObject) else state)


def _blank(padding: ShardedTensor) -> ShardedTensor:
    """Padding as zeros that end where the bucket ends.

    megatron-core would save uninitialised memory. Before a shared embedding it would also save too much of it, since `numel_unpadded` then
    counts the gap between the two.
    """
    length = min(padding.local_shape[0], padding.global_shape[0] - padding.global_offset[0])
    return replace(padding, data=torch.zeros_like(padding.data[:length]), local_shape=(length,))


def _without_extra_state(state: State) -> State:
    """`state` without the `_extra_state` of its linears, a pickle of Transformer Engine: fp8_scales.py saves what is in it."""

    def emptied(value: Any) -> Any:
        if not isinstance(value, ShardedObject):
            return value
        return LocalNonpersistentObject(None if value.data is None else torch.empty(0, dtype=torch.uint8))

    return {key: emptied(value) if key.endswith("_extra_state") else value for key, value in state.items()}


# ---- from disk ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """A tensor that the run wants, and that the checkpoint lacks or has in another shape."""

    key: str
    wanted: tuple[int, ...]
    saved: tuple[int, ...] | None
    """None: the checkpoint has no such tensor."""

    def __str__(self) -> str:
        return f"{self.key} is {'missing' if self.saved is None else f'{list(self.saved)}'} there and {list(self.wanted)} here"


def mismatches(state: State, sizes: dict[str, tuple[int, ...]]) -> list[Mismatch]:
    """Where this rank's `state` cannot be loaded from tensors of these global sizes."""
    wanted: dict[str, tuple[int, ...]] = {}
    for leaf in nested_values(state):
        built = nested_values(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]
        wanted |= {tensor.key: tuple(tensor.global_shape) for tensor in built if isinstance(tensor, ShardedTensor)}
    return [Mismatch(key, shape, sizes.get(key)) for key, shape in sorted(wanted.items()) if sizes.get(key) != shape]


def differs_in_vocabulary(mismatch: Mismatch, vocabulary_size: int) -> bool:
    """Whether a tensor has a row for each id on both sides, with other padding or more ids in the checkpoint. `load` then reads the rows
    that both have, and makes the others 0."""
    saved, wanted = mismatch.saved, mismatch.wanted
    by_id = mismatch.key in ("embedding.word_embeddings.weight", "output_layer.weight")
    return by_id and saved is not None and saved[1:] == wanted[1:] and saved[0] >= vocabulary_size


def load(state: State, directory: Path, groups: ProcessGroupCollection) -> State:
    """Fill `state` from a checkpoint whose files and pickles have been verified. Collective over all ranks.

    Each data- and context-parallel rank reads a share, then the shares are exchanged. All chunks must be in one `state`.
    """
    # Weights that the model has only in FP8 are read in bfloat16 and rounded once, as a whole. megatron-core 0.19 would round each half of
    # a gated MLP's first weight, and then their concatenation again.
    force_all_tensors_to_non_fp8(state)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), groups.dp_cp)
    with quiet_checkpointing():
        return dist_checkpointing.load(state, str(directory), sharded_strategy=strategy)


def load_model(chunks: Sequence[nn.Module], loaded: State) -> None:
    """Give the chunks what `load` returned for them."""
    for key, chunk in zip(chunk_keys(len(chunks)), chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[key])
