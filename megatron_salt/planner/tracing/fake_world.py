"""A world of ranks that do not exist, and tensors without memory: for a child process alone, which does nothing else.

Collectives of torch's `fake` backend return at once. Fake tensors know shape, dtype and the size of their storage. What would read a
number out of a fake tensor is answered by a dispatch mode. Two functions of torch are replaced inside the blocks: `Module.to`, which
cannot convert parameters that are fake, and `all_gather_object`, which reads what it received.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state


@contextlib.contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """torch.distributed as rank `rank` of `world_size` sees it. Groups that are made inside the block end with it."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    original = dist.all_gather_object
    dist.all_gather_object = _everybody_has_mine
    try:
        yield
    finally:
        dist.all_gather_object = original
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _everybody_has_mine(object_list: list, obj: object, group: dist.ProcessGroup | None = None) -> None:
    """`all_gather_object` among ranks that do not exist."""
    object_list[:] = [obj] * len(object_list)


_COALESCED = (
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)
"""Collectives in place, for which torch has no form on fake tensors."""


class _Answers(TorchDispatchMode):
    """Answers what a fake tensor cannot: its values. Every number is 1, every comparison of tensors holds."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if function is torch.ops.aten.equal.default:
            return True
        if function in _COALESCED:
            return FakeWork().boxed()
        return function(*args, **(kwargs or {}))


def _to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`Module.to` for a dtype: each parameter of another one is replaced."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.dtype != dtype:
                part.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))
    return module


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are made inside the block have no memory."""
    original = nn.Module.to
    nn.Module.to = _to_dtype  # type: ignore[assignment, method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers():
            yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]
