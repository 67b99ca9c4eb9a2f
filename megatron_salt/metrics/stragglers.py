"""A heartbeat file for launchers, and a report of the slowest rank.

Step times are equal on all ranks, because ranks wait for each other. So the report times what a rank does alone: reading its data, and a
fixed set of matrix products. These take longer on a throttled GPU, or on a core that others use.

Neither costs a step a measurable time. One rank writes the heartbeat every ten seconds. The report takes a few matrix products and one
gather of two numbers a rank, once in --straggler-report-interval steps.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_salt.files import write_whole
from megatron_salt.parallel.device import current_device

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
_PRODUCTS = 16  # matrix products in one timing


class Heartbeat:
    """Shows on disk that the run moves: `path` holds the step of the last beat."""

    def __init__(self, path: str | None, active: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """active: True on the one rank that writes."""
        self._path = Path(path) if path is not None and active else None
        self._clock = clock
        self._written: float | None = None
        self._reported = False

    def beat(self, step: int) -> None:
        """Call after every step; writes at most every ten seconds. An error of the disk is logged once."""
        if self._path is None or (self._written is not None and self._clock() - self._written < BEAT_SECONDS):
            return
        self._written = self._clock()
        try:
            write_whole(self._path, f"{step}\n".encode("ascii"))
            self._reported = False
        except OSError as error:
            if not self._reported:
                log.warning("--heartbeat-file %s cannot be written (%s); the run goes on, and tries again", self._path, error)
            self._reported = True


@dataclass(frozen=True)
class Slowest:
    """The slowest of all ranks in one measurement."""

    rank: int
    seconds: float
    median: float
    """Seconds, over all ranks."""

    @classmethod
    def of(cls, seconds: list[float]) -> Slowest:
        """The slowest of `seconds`, one value a rank. Pure."""
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        return cls(rank, seconds[rank], statistics.median(seconds))


class StragglerReport:
    """Names, every `interval` steps, the ranks that read their data and that calculated most slowly."""

    def __init__(self, interval: int | None, arithmetic: Callable[[], float] | None = None) -> None:
        """arithmetic: times a fixed calculation on this rank, in seconds; default `time_products`. interval: None turns the report off.

        Collective over all ranks unless `interval` is None.
        """
        self._interval = interval
        self._arithmetic = arithmetic or time_products
        self._data_seconds = 0.0
        self._hosts: list[str] = [""] * dist.get_world_size()
        if interval is not None:
            dist.all_gather_object(self._hosts, os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def after_step(self, step: int, data_seconds: float) -> tuple[str, dict[str, Any]] | None:
        """Message and facts where a report is due, the same on every rank; else None. Collective over all ranks.

        data_seconds: how long this rank took to read its microbatches in this step.
        """
        self._data_seconds += data_seconds
        if self._interval is None or step % self._interval:
            return None
        own = torch.tensor([self._arithmetic(), self._data_seconds], dtype=torch.float32, device=current_device())
        self._data_seconds = 0.0
        everyone = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(everyone, own)
        arithmetic, data = (Slowest.of(column) for column in torch.stack(everyone).T.tolist())
        message = (
            f"slowest of {len(self._hosts)} ranks: arithmetic {self._place(arithmetic.rank)} {1e3 * arithmetic.seconds:.2f} ms "
            f"(median {1e3 * arithmetic.median:.2f}), data {self._place(data.rank)} {data.seconds:.3f} s in {self._interval} steps "
            f"(median {data.median:.3f})"
        )
        return message, {"slowest": {name: {**vars(one), "host": self._hosts[one.rank]} for name, one in
                                     (("arithmetic", arithmetic), ("data", data))}}  # fmt: skip

    def _place(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def time_products() -> float:
    """Seconds of a fixed number of matrix products on this rank's device, after a warm-up. Draws no random number."""
    device = current_device()
    size, dtype = (256, torch.float32) if device.type == "cpu" else (4096, torch.bfloat16)
    matrix = torch.full((size, size), 1.0 / size, dtype=dtype, device=device)
    product = matrix @ matrix
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _nothing
    synchronise()
    started = time.perf_counter()
    for _ in range(_PRODUCTS):
        product = matrix @ product
    synchronise()
    return time.perf_counter() - started


def _nothing() -> None:
    """The CPU runs nothing asynchronously."""
