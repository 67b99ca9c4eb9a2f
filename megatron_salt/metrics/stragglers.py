"""Signs of life for whoever watches a run: a heartbeat that a launcher can see, and which rank is the slowest.

Neither costs a step anything that can be measured: the heartbeat is a clock's reading, and every ten seconds a small file from one rank;
the report is a few matrix products and one gather of two numbers a rank, once in --straggler-report-interval steps. In a step all ranks
wait for the slowest, so that their step times are alike; what differs is what each does alone, and that is what is compared: reading
its data, and a fixed piece of arithmetic, which a throttled GPU or a core that others use does more slowly.
"""

from __future__ import annotations

import contextlib
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

from megatron_salt.parallel.device import current_device

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
_PRODUCTS = 16  # of one timing


class Heartbeat:
    """Shows on disk that steps go by: `path` holds the step of the last beat, and changes while the run moves."""

    def __init__(self, path: str | None, active: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """active: on the one rank that writes."""
        self._path = Path(path) if path is not None and active else None
        self._clock = clock
        self._written: float | None = None
        self._told = False

    def beat(self, step: int) -> None:
        """After every step; writes when the last writing is ten seconds old. A disk that cannot take it is told once."""
        if self._path is None or (self._written is not None and self._clock() - self._written < BEAT_SECONDS):
            return
        self._written = self._clock()
        tmp = self._path.with_name(self._path.name + ".tmp")
        try:
            tmp.write_text(f"{step}\n", encoding="ascii")
            os.replace(tmp, self._path)
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning("--heartbeat-file %s cannot be written (%s); the run goes on, and tries again", self._path, error)
            self._told = True
            with contextlib.suppress(OSError):
                tmp.unlink(missing_ok=True)


@dataclass(frozen=True)
class Slowest:
    """The slowest of all ranks at one thing."""

    rank: int
    seconds: float
    median: float
    """Of all ranks, seconds."""

    @classmethod
    def of(cls, seconds: list[float]) -> Slowest:
        """By rank. Pure."""
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        return cls(rank, seconds[rank], statistics.median(seconds))


class StragglerReport:
    """Every `interval` steps: which rank read its data, and which calculated, more slowly than the others."""

    def __init__(self, interval: int | None, arithmetic: Callable[[], float] | None = None) -> None:
        """arithmetic: seconds of a fixed piece of it on this rank; default `time_products`. Collective where `interval` is not None."""
        self._interval = interval
        self._arithmetic = arithmetic or time_products
        self._data_seconds = 0.0
        self._hosts: list[str] = [""] * dist.get_world_size()
        if interval is not None:
            dist.all_gather_object(self._hosts, os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def after_step(self, step: int, data_seconds: float) -> tuple[str, dict[str, Any]] | None:
        """A sentence and its facts where a report is due, the same on every rank; else None. Collective over all ranks.

        data_seconds: what this rank took to read its microbatches in this step.
        """
        self._data_seconds += data_seconds
        if self._interval is None or step % self._interval:
            return None
        mine = torch.tensor([self._arithmetic(), self._data_seconds], dtype=torch.float32, device=current_device())
        self._data_seconds = 0.0
        everyone = [torch.empty_like(mine) for _ in self._hosts]
        dist.all_gather(everyone, mine)
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
    """Seconds of a fixed number of matrix products on this rank's device, after one that warms it up. Draws no random number."""
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
    """The CPU does not run ahead."""
