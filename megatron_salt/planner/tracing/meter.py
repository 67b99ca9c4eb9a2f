"""Counts the bytes of tensors that are alive in this process, real or fake, and the most at one time between marks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Meter(TorchDispatchMode):
    """Inside the block every storage that an operation returns is counted from then until it is freed.

    Storages that were there before count from the first operation that returns a view of them: `known` takes those out. What a kernel
    allocates and frees inside itself is not seen. `untracked` lets pieces of a test or of a trace go uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._peak = 0
        self._sizes: dict[int, int] = {}
        self._paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._paused:
            tree_map_only(Tensor, self._count, result)
        return result

    @contextlib.contextmanager
    def untracked(self) -> Iterator[None]:
        """Storages that are made inside the block never count."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def known(self, tensors: Iterator[Tensor] | list[Tensor]) -> None:
        """Leave the storages of these tensors out of the count."""
        for tensor in tensors:
            self._remember(tensor.untyped_storage(), 0)

    def peak(self) -> int:
        """The most bytes that were alive at one time since the last call, which begins anew."""
        peak, self._peak = self._peak, self.live
        return peak

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._remember(storage, storage.nbytes())
        return tensor

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.live += size
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
