"""One launch of several ranks, and the store that its ranks share at MASTER_ADDR:MASTER_PORT.

torchrun's agent hosts the store; without torchrun rank 0 does. Imports torch only when it connects.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_salt.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT_SECONDS = 10.0  # for one connection to a store that listens


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process in a launch of several ranks."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    agent_hosts: bool
    """Whether torchrun's agent hosts the store; otherwise rank 0 does."""
    attempt: str
    """torchrun's restart count: a restart must not read what the previous attempt left in the store."""

    @property
    def hosts(self) -> bool:
        """Whether this process hosts the store."""
        return self.rank == 0 and not self.agent_hosts

    @property
    def others(self) -> list[int]:
        """All ranks except this one."""
        return [rank for rank in range(self.world_size) if rank != self.rank]


def launch_from_environment() -> Launch | None:
    """What the launcher has set; None without a launcher, or without MASTER_ADDR and MASTER_PORT. Raises UserError."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return None
    return Launch(
        rank=_number("RANK"),
        world_size=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK", "0"),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT"),
        agent_hosts=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True),
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


class StoreConnection:
    """A connection to the store of a launch, and an idle second one, which shows when the process of the store is gone."""

    def __init__(self, launch: Launch) -> None:
        """Connect once; rank 0 without torchrun hosts the store. Raises OSError, or torch's DistError."""
        import torch.distributed as dist

        self.launch = launch
        store = dist.TCPStore(
            launch.address, launch.port, launch.world_size, launch.hosts, timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False, multi_tenant=True, use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )  # fmt: skip
        self.store: Store = dist.PrefixStore(f"megatron_salt/{launch.attempt}", store)
        self._line = socket.create_connection((launch.address, launch.port), timeout=_CONNECT_SECONDS)
        self._line.setblocking(False)

    def is_cut(self) -> bool:
        """Whether the process of the store has closed the connection or died."""
        try:
            return self._line.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the idle connection. The other one lives as long as somebody uses the store."""
        self._line.close()


def listens(launch: Launch) -> bool:
    """Whether a store can be reached. Always true for the process that hosts it."""
    if launch.hosts:
        return True
    try:
        socket.create_connection((launch.address, launch.port), timeout=_CONNECT_SECONDS).close()
    except OSError:  # a host name that cannot be resolved now may be known later
        return False
    return True


def gone(launch: Launch) -> str:
    """The message when the process of the store has closed its connections."""
    who = "torchrun's agent" if launch.agent_hosts else "rank 0"
    return f"{who} at {launch.address}:{launch.port} does not answer any more (killed? out of memory?)"


def this_process() -> str:
    """What tells other processes of this machine whether this one lives: start of the machine, pid namespace, pid. Empty outside Linux."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')} {os.getpid()}"
    except OSError:
        return ""


def lives(connection: StoreConnection, rank: int) -> bool | None:
    """Whether the process of a rank runs; None where this process cannot see it: on another machine, or before it has joined."""
    key = f"process/{rank}"
    if not connection.store.check([key]):
        return None
    *place, pid = connection.store.get(key).decode().split() or [""]
    if not pid or place != this_process().split()[:-1]:
        return None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a killed process that its parent has not asked for is a zombie


def named(ranks: list[int]) -> str:
    """`rank 3` or `ranks 3, 5`; at most twenty ranks are listed."""
    shown = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _number(name: str, default: str | None = None) -> int:
    text = os.environ[name] if default is None else os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment's {name} must be a number, got {text!r}") from None
