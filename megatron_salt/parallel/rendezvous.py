"""Where the ranks of a launch meet: a store at MASTER_ADDR:MASTER_PORT, as torchrun and Slurm scripts set them.

torchrun's agent hosts the store, without it rank 0 does. Nobody goes on until every rank has come; who is missing is named every 30
seconds, and the wait has an end. Whatever fails on one rank is in the store too: parallel/failure.py. Imports torch only when it connects.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_salt.errors import LeftEarly, LostRankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

TELL_EVERY = 30.0  # seconds between lines about who is missing
_SLACK = 10.0  # seconds that other ranks wait longer than the one that names the missing
_CONNECT = 10.0  # seconds for one connection to a store that listens


@dataclass(frozen=True)
class Launch:
    """This process's place in a launch of several."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    agent_hosts: bool
    """torchrun's agent hosts the store; otherwise rank 0 does."""
    attempt: str
    """torchrun's restart count: a restart must not read what the attempt before it left in the store."""

    @property
    def hosts(self) -> bool:
        """Whether the store lives in this process."""
        return self.rank == 0 and not self.agent_hosts

    @property
    def others(self) -> list[int]:
        """Every rank but this one."""
        return [rank for rank in range(self.world_size) if rank != self.rank]


def launch_from_environment() -> Launch | None:
    """What the launcher has set; None without one, or where it names no meeting place. Raises UserError."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return None
    return Launch(
        _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0"), os.environ["MASTER_ADDR"], _number("MASTER_PORT"),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip


class Contact:
    """A connection to the store of a launch, and an idle one beside it, which shows quietly that the store's process is gone."""

    def __init__(self, launch: Launch) -> None:
        """Connects once, hosting the store where this process does. Raises OSError, or torch's DistError."""
        import torch.distributed as dist

        self.launch = launch
        store = dist.TCPStore(
            launch.address, launch.port, launch.world_size, launch.hosts, timedelta(seconds=_CONNECT),
            wait_for_workers=False, multi_tenant=True, use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )  # fmt: skip
        self.store: Store = dist.PrefixStore(f"megatron_salt/{launch.attempt}", store)
        self._line = socket.create_connection((launch.address, launch.port), timeout=_CONNECT)
        self._line.setblocking(False)

    def is_cut(self) -> bool:
        """Whether the store's process has closed the connection, or died."""
        try:
            return self._line.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the idle connection; the store's own lasts as long as somebody uses it."""
        self._line.close()


def listens(launch: Launch) -> bool:
    """Whether somebody can be reached at the meeting place. The process that hosts the store need not look."""
    if launch.hosts:
        return True
    try:
        socket.create_connection((launch.address, launch.port), timeout=_CONNECT).close()
    except OSError:  # a name that cannot be resolved may be known a little later
        return False
    return True


def no_reason() -> None:
    """The reason to leave of a program that nobody tells to."""


def meet(launch: Launch, timeout: timedelta, leaving: Callable[[], str | None] = no_reason) -> Contact:
    """Wait until every rank has come. Raises LostRankError after `timeout`, failure.PeerFailed where another rank failed or left.

    leaving: the reason to give up waiting, None to go on; then LeftEarly is raised, and the other ranks end as well."""
    from megatron_salt.parallel.failure import refuse_failed

    deadline = time.monotonic() + timeout.total_seconds()
    contact = _reach_host(launch, timeout, deadline, leaving)
    contact.store.set(f"host/{launch.rank}", socket.gethostname())
    # Twice: whoever died while it waited is missed the second time.
    for call in ("joined", "ready"):
        contact.store.set(f"{call}/{launch.rank}", "")
        first = contact.store.add(call, 1) == 1  # this rank names the missing
        begun = told = time.monotonic()
        pause = 0.005
        while not contact.is_cut() and contact.store.add(call, 0) < launch.world_size:
            refuse_failed(contact)
            now, reason = time.monotonic(), leaving()
            late = now >= deadline + (0.0 if first else _SLACK)
            if late or reason is not None:
                missing = named([rank for rank in range(launch.world_size) if not contact.store.check([f"{call}/{rank}"])])
                if reason is not None:
                    raise _left(reason, f"{missing} of {launch.world_size}")
                raise LostRankError(
                    f"{missing} of {launch.world_size} did not join within {_given(timeout)}; look for its log, its node, "
                    f"and whether it reaches {launch.address}:{launch.port}"
                )
            if first and now - told >= TELL_EVERY:
                told = now
                missing = named([rank for rank in range(launch.world_size) if not contact.store.check([f"{call}/{rank}"])])
                _say(f"waiting for {missing} of {launch.world_size} for {now - begun:.0f} s")
            time.sleep(pause)
            pause = min(1.0, 1.3 * pause)
        if contact.is_cut():
            raise LostRankError(gone(launch))
    return contact


def gone(launch: Launch) -> str:
    """What can be said when the store's process has closed its connections."""
    who = "torchrun's agent" if launch.agent_hosts else "rank 0"
    return f"{who} at {launch.address}:{launch.port} does not answer any more (killed? out of memory?)"


def named(ranks: list[int]) -> str:
    """ "rank 3", or "ranks 3, 5"; at most twenty of them."""
    shown = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _left(reason: str, missing: str) -> LeftEarly:
    return LeftEarly(f"left before it began: {reason} while waiting for {missing}")


def _reach_host(launch: Launch, timeout: timedelta, deadline: float, leaving: Callable[[], str | None]) -> Contact:
    begun = told = time.monotonic()
    while not listens(launch):
        now = time.monotonic()
        if now >= deadline:
            raise LostRankError(
                f"rank 0 did not join within {_given(timeout)}: nobody listens at MASTER_ADDR {launch.address}, "
                f"MASTER_PORT {launch.port}"
            )
        if (reason := leaving()) is not None:
            raise _left(reason, f"rank 0 of {launch.world_size}")
        if launch.local_rank == 0 and now - told >= TELL_EVERY:
            told = now
            _say(f"waiting for rank 0 of {launch.world_size} at {launch.address}:{launch.port} for {now - begun:.0f} s")
        time.sleep(0.2)
    try:
        return Contact(launch)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if launch.hosts:
            raise UserError(
                f"MASTER_PORT {launch.port} cannot be opened on this host, {socket.gethostname()}: {reason}"
            ) from error
        raise LostRankError(
            f"what listens at MASTER_ADDR {launch.address}, MASTER_PORT {launch.port} is no store of this launch: {reason}"
        ) from error


def _number(name: str, default: str | None = None) -> int:
    text = os.environ[name] if default is None else os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment's {name} must be a number, got {text!r}") from None


def _given(timeout: timedelta) -> str:
    return f"--rendezvous-timeout-minutes {timeout.total_seconds() / 60:g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
