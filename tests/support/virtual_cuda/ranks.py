"""Ranks under virtual CUDA: `run_virtual(2, function, *arguments)`, as `tests.support.ranks.run_ranks`.

They are processes of their own, started anew: in the workers of `run_ranks` the CPU's patches are already in place.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tests.support.rank_worker import serve
from tests.support.ranks import Pool
from tests.support.virtual_cuda.installation import install
from tests.support.virtual_cuda.recorder import Report
from tests.support.virtual_cuda.steps import label_steps, shorten_measurements


class Recorded(NamedTuple):
    """What a rank returned, and what was recorded meanwhile."""

    result: Any
    report: Report


def _serve(pipe: Connection) -> None:
    recorder = install()
    label_steps(recorder)
    shorten_measurements()
    serve(pipe)


_pool = Pool(_serve, "spawn")


def run_virtual(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Recorded]:
    """Call `function(*arguments)` in `world_size` processes, each with a virtual GPU of its own. Raises RankError."""
    return _pool.run(world_size, _recorded, function, arguments, timeout=timeout)


def _recorded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Recorded:
    recorder = install()
    recorder.take()
    result = function(*arguments)
    return Recorded(result, recorder.take())


def shutdown() -> None:
    """Kill the processes, if there are any."""
    _pool.shutdown()
