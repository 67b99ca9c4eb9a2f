"""The start of a launch: every rank waits at the store (launch_store.py) until all ranks have joined.

The missing ranks are named every 30 seconds, and the wait has an end. A failure on one rank ends the wait too, see failure.py.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

from megatron_salt.config.parallel import Device
from megatron_salt.errors import LeftEarly, LostRankError, MachineError, UserError
from megatron_salt.parallel.failure import refuse_failed
from megatron_salt.parallel.launch_store import Launch, StoreConnection, gone, listens, named, this_process

Backend = Literal["nccl", "gloo"]
"""nccl: on a GPU; gloo: on the CPU."""


@dataclass(frozen=True, kw_only=True)
class RankDevice:
    """Where a rank computes: what all ranks must have in common before the first collective."""

    rank: int
    host: str
    asked: Device
    """--device."""
    backend: Backend
    gpu: str | None
    """Identity of the only GPU that the rank is shown; None on the CPU, and where it is shown several."""


REPORT_EVERY = 30.0  # seconds between lines about missing ranks
_SLACK = 10.0  # seconds that the other ranks wait longer than the rank that names the missing ones


def no_reason() -> None:
    """The `leaving` of a program that never exits early."""


def meet(launch: Launch, timeout: timedelta, own: RankDevice, leaving: Callable[[], str | None] = no_reason) -> StoreConnection:
    """Wait until every rank has joined. Raises LostRankError after `timeout`, failure.PeerFailed if another rank failed or left.

    own: the device of this rank; raises MachineError or UserError where it does not go together with another rank's.
    leaving: returns a reason to stop waiting, or None. With a reason LeftEarly is raised, and the other ranks end as well.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    connection = _reach_host(launch, timeout, deadline, leaving)
    connection.store.set(f"host/{launch.rank}", socket.gethostname())
    connection.store.set(f"process/{launch.rank}", this_process())
    _refuse_mixed_devices(connection, own)
    # Twice: a rank that dies while it waits is missing the second time.
    for call in ("joined", "ready"):
        connection.store.set(f"{call}/{launch.rank}", "")
        first = connection.store.add(call, 1) == 1  # the first rank names the missing ones
        begun = reported = time.monotonic()
        pause = 0.005
        while not connection.is_cut() and connection.store.add(call, 0) < launch.world_size:
            refuse_failed(connection)
            now, reason = time.monotonic(), leaving()
            late = now >= deadline + (0.0 if first else _SLACK)
            if late or reason is not None:
                missing = named([rank for rank in range(launch.world_size) if not connection.store.check([f"{call}/{rank}"])])
                if reason is not None:
                    raise _left(reason, f"{missing} of {launch.world_size}")
                raise LostRankError(
                    f"{missing} of {launch.world_size} did not join within {_given(timeout)}; look for its log, its node, "
                    f"and whether it reaches {launch.address}:{launch.port}"
                )
            if first and now - reported >= REPORT_EVERY:
                reported = now
                missing = named([rank for rank in range(launch.world_size) if not connection.store.check([f"{call}/{rank}"])])
                _say(f"waiting for {missing} of {launch.world_size} for {now - begun:.0f} s")
            time.sleep(pause)
            pause = min(1.0, 1.3 * pause)
        if connection.is_cut():
            raise LostRankError(gone(launch))
    return connection


def _refuse_mixed_devices(connection: StoreConnection, own: RankDevice) -> None:
    """Compare this rank's device with that of the rank that came first. A collective between NCCL and gloo would wait until its timeout."""
    first = RankDevice(**json.loads(connection.store.compare_set("device", "", json.dumps(asdict(own)))))
    if own.asked != first.asked:
        raise UserError(
            f"--device is {first.asked} on rank {first.rank} at {first.host} and {own.asked} on rank {own.rank} at {own.host}: start "
            "every rank with the same flags"
        )
    if own.backend != first.backend:
        on_cpu, on_gpu = (own, first) if own.backend == "gloo" else (first, own)
        raise MachineError(
            on_cpu.host,
            f"rank {on_cpu.rank} sees no GPU there and would use gloo, while rank {on_gpu.rank} at {on_gpu.host} has a GPU and NCCL; "
            "--device cpu runs all ranks without GPUs",
        )
    if own.gpu is not None:
        other = int(connection.store.compare_set(f"gpu/{own.gpu}", "", str(own.rank)))
        if other != own.rank:
            raise UserError(
                f"ranks {other} and {own.rank} are shown the same GPU of {own.host}, {own.gpu}: start one rank a GPU"
            )


def _left(reason: str, missing: str) -> LeftEarly:
    return LeftEarly(f"left before it began: {reason} while waiting for {missing}")


def _reach_host(launch: Launch, timeout: timedelta, deadline: float, leaving: Callable[[], str | None]) -> StoreConnection:
    begun = reported = time.monotonic()
    while not listens(launch):
        now = time.monotonic()
        if now >= deadline:
            raise LostRankError(
                f"rank 0 did not join within {_given(timeout)}: nobody listens at MASTER_ADDR {launch.address}, "
                f"MASTER_PORT {launch.port}"
            )
        if (reason := leaving()) is not None:
            raise _left(reason, f"rank 0 of {launch.world_size}")
        if launch.local_rank == 0 and now - reported >= REPORT_EVERY:
            reported = now
            _say(f"waiting for rank 0 of {launch.world_size} at {launch.address}:{launch.port} for {now - begun:.0f} s")
        time.sleep(0.2)
    try:
        return StoreConnection(launch)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if launch.hosts:
            raise UserError(
                f"MASTER_PORT {launch.port} cannot be opened on this host, {socket.gethostname()}: {reason}"
            ) from error
        raise LostRankError(
            f"what listens at MASTER_ADDR {launch.address}, MASTER_PORT {launch.port} is no store of this launch: {reason}"
        ) from error


def _given(timeout: timedelta) -> str:
    return f"--rendezvous-timeout-minutes {timeout.total_seconds() / 60:g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
