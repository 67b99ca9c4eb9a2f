"""Scales and maxima of FP8's delayed scaling, as tensors of a checkpoint.

Transformer Engine keeps them in each module's `_extra_state`, a pickle that it loads only where told to trust it. Here they are
float32 tensors `fp8.<linear>` [layers, 1 + history, 5]: row 0 holds scales, the rows below hold maxima. Three columns are for forward
(input, weight, output), two for backward (gradients of output and input). Maxima are reduced over tp, dp and cp, so every rank has the
same, and they load under any layout, into longer or shorter histories. A checkpoint without them, or a run without delayed scaling, is no
error: scales then start anew, or are not read. The other recipes keep no state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import TE_LINEAR_TYPES, get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_salt.checkpoint.sharded_state import State, unwrapped
from megatron_salt.parallel.device import current_device

log = logging.getLogger(__name__)

PREFIX = "fp8."
_COLUMNS = {"scaling_fwd": 3, "scaling_bwd": 2}
"""Columns of each of a linear's two states in Transformer Engine, in the order of our tensor."""


def state_to_save(chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> State:
    """The sharded tensors of all linears that have made a step under delayed scaling; empty without it. Not collective."""
    return {
        name: _sharded(key, _packed(linear), place, groups)
        for name, key, linear, place in _linears(chunks)
        if _COLUMNS.keys() <= linear.fp8_meta.keys()
    }


def state_to_load(chunks: Sequence[nn.Module], groups: ProcessGroupCollection, sizes: dict[str, tuple[int, ...]]) -> State:
    """Sharded zeros to load this rank's linears into, for those that the checkpoint has. sizes: global sizes of its tensors, by key.
    Not collective."""
    state = {}
    for name, key, _, place in _linears(chunks):
        if key in sizes:
            state[name] = _sharded(key, torch.zeros(sizes[key][1:], device=current_device()), place, groups)
        elif place[1] == 0:
            log.warning("the checkpoint has no delayed scales of %s: they begin anew", key.removeprefix(PREFIX))
    return state


def load_state(chunks: Sequence[nn.Module], loaded: State) -> None:
    """Give the linears what `sharded_state.load` returned for `state_to_load`. Not collective."""
    for name, _, linear, _ in _linears(chunks):
        if name not in loaded:
            continue
        # The same as TransformerEngineBaseModule.set_extra_state, without the pickle.
        linear.fp8_meta["num_gemms"] = 1
        linear.fp8_meta["recipe"] = get_fp8_recipe(linear.config)
        linear.init_fp8_meta_tensors(linear.fp8_meta["recipe"])
        for key, part in zip(_COLUMNS, loaded[name].split(list(_COLUMNS.values()), dim=1), strict=True):
            scaling = linear.fp8_meta[key]
            rows = min(len(scaling.amax_history), len(part) - 1)
            scaling.scale.copy_(part[0])
            scaling.amax_history[:rows].copy_(part[1 : 1 + rows])


def _linears(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, str, Any, tuple[int, int, int]]]:
    """All linears under delayed scaling: (name on this rank, key in a checkpoint, linear, (axis, layer, number of layers))."""
    for number, chunk in enumerate(chunks):
        model: Any = unwrapped(chunk)
        if not model.config.fp8 or model.config.fp8_recipe != "delayed":
            continue
        for layer in model.decoder.layers:
            at = layer.layer_number - 1
            for path, module in layer.named_modules():
                if isinstance(module, TE_LINEAR_TYPES):
                    yield f"{number}.{at}.{path}", f"{PREFIX}{path}", module, (0, at, model.config.num_layers)


def _packed(linear: Any) -> Tensor:
    """A linear's tensor [1 + history, 5]: scales, then maxima."""
    parts = [torch.cat([linear.fp8_meta[key].scale[None], linear.fp8_meta[key].amax_history]) for key in _COLUMNS]
    return torch.cat(parts, dim=1)


def _sharded(key: str, tensor: Tensor, place: tuple[int, int, int], groups: ProcessGroupCollection) -> ShardedTensor:
    replica = (0, dist.get_rank(groups.tp), dist.get_rank(groups.dp_cp))
    return ShardedTensor.from_rank_offsets(key, tensor, place, replica_id=replica, prepend_axis_num=1)
