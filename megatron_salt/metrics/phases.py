"""Seconds of the phases of a step as the device spends them, and the clock that knows them.

With a GPU the host only launches work, so its own clock would count all waiting for the device to the phase that reads a result. There a
mark is a CUDA event. Nobody waits for an event before the log reads the seconds, together with the losses of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from megatron_salt.parallel.device import current_device, reach


class Clock(Protocol):
    """Marks moments, and says later how far apart they were."""

    def mark(self) -> Any:
        """This moment. Waits for nothing."""
        ...

    def seconds(self, begun: Any, ended: Any) -> float:
        """Seconds between two marks. May wait until the second one is reached."""
        ...


class HostClock:
    """On a CPU an operation is done when its call returns. A mark is a time in seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun


class DeviceClock:
    """A mark is an event in the GPU's current stream: the moment in which the GPU has done all work that was launched before it.

    So a phase in which the host alone works counts as long as the GPU stands still for it.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        reach(ended)
        return begun.elapsed_time(ended) / 1000


def clock_of_device() -> Clock:
    """The clock for this process's device."""
    return DeviceClock() if current_device().type == "cuda" else HostClock()


class _Piece(NamedTuple):
    """Time without a change of phase."""

    phase: str
    begun: Any
    ended: Any


class PhaseTimer:
    """Seconds of each named phase, summed between two calls of `take`.

    Time in a phase inside another counts for the inner one alone, so the phases never add up to more than the time that passed.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        """clock: None for the one of this process's device."""
        self._clock = clock or clock_of_device()
        self._pieces: list[_Piece] = []
        self._running: list[str] = []
        self._since: Any = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._change()
        self._running.append(name)
        try:
            yield
        finally:
            self._change()
            self._running.pop()

    def take(self) -> Callable[[], dict[str, float]]:
        """A function that gives {phase: seconds} since the last take. Only that function may wait for the device."""
        assert not self._running, f"take inside phase {self._running[-1]}"
        taken, self._pieces = self._pieces, []
        return partial(_sums, taken, self._clock)

    def _change(self) -> None:
        """Note the time since the last change of phase for the phase that was running."""
        now = self._clock.mark()
        if self._running:
            self._pieces.append(_Piece(self._running[-1], self._since, now))
        self._since = now


def _sums(pieces: Sequence[_Piece], clock: Clock) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for phase, begun, ended in pieces:
        seconds[phase] = seconds.get(phase, 0.0) + clock.seconds(begun, ended)
    return seconds
