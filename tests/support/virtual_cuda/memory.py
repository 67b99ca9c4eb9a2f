"""Which storages would lie on the GPU, and how much memory they take there."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""Bytes. CUDA's caching allocator hands out multiples of it."""
_ON_GPU, _PINNED = "_virtual_gpu_memory", "_virtual_pinned_memory"


class Memory:
    """Bytes allocated now and at most."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0

    def reset_peak(self) -> None:
        self.peak = self.allocated


MEMORY = Memory()


class _Allocation:
    """Memory of one storage: an attribute of the storage, so that it ends as the storage ends."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = -(-num_bytes // BLOCK) * BLOCK
        MEMORY.allocated += self.num_bytes
        MEMORY.peak = max(MEMORY.peak, MEMORY.allocated)

    def __del__(self) -> None:
        MEMORY.allocated -= self.num_bytes


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a wrapper of other tensors has none
        return None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor would lie on the GPU."""
    return hasattr(_storage(tensor), _ON_GPU)


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor would lie in pinned memory of the host."""
    return hasattr(_storage(tensor), _PINNED)


def place(tensor: Tensor, gpu: bool) -> Tensor:
    """Declare where the tensor's storage lies. Returns the tensor."""
    storage = _storage(tensor)
    if gpu and storage is not None and not hasattr(storage, _ON_GPU):
        setattr(storage, _ON_GPU, _Allocation(storage.nbytes()))
    elif not gpu and hasattr(storage, _ON_GPU):
        delattr(storage, _ON_GPU)
    return tensor


def pin(tensor: Tensor) -> Tensor:
    """Declare the tensor's storage pinned memory of the host. Returns the tensor."""
    setattr(_storage(tensor), _PINNED, True)
    return tensor


def footprint(tensor: Tensor) -> int:
    """Bytes of the elements that a kernel touches: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()
