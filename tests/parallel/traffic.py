"""Which collectives run on which process groups, and which keys of the store their making touches."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts the communication inside the block: {(group's description, operation): calls}. Groups of one rank do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[tuple[str, str]]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d":
            boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            [group] = [dist.ProcessGroup.unbox(box) for box in boxed if box._type().name() == "ProcessGroup"]
            if group.size() > 1:
                self.calls[group.group_desc, operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def groups(self) -> set[str]:
        """Descriptions of the groups that were used."""
        return {group for group, _ in self.calls}


class CountedStore(dist.Store):
    """Another store, and the keys of its operations."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store, self.keys = store, list[str]()

    def set(self, key: str, value: Any) -> None:
        """As torch's."""
        self.keys.append(key)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        """As torch's."""
        self.keys.append(key)
        return self.store.get(key)

    def add(self, key: str, amount: int) -> int:
        """As torch's."""
        self.keys.append(key)
        return self.store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """As torch's."""
        self.keys += keys
        return self.store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(minutes=1)) -> None:
        """As torch's."""
        self.keys += keys
        self.store.wait(keys, timeout)
