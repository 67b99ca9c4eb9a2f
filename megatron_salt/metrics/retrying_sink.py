"""A sink that never ends a run. It keeps what its sink cannot take and offers it again, after longer and longer pauses.

A failure is reported once on stderr, and so is its end. Only a UserError while the sink opens is let through: it is a mistake in the
flags. Whatever else a log's library, disk or server raises is reported and tried again.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable

from megatron_salt.errors import UserError
from megatron_salt.metrics.sinks import Entry, Sink

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 600.0
"""Seconds between attempts: they double."""
KEPT = 50_000
"""Entries that wait at most; the oldest are dropped first."""


class RetryingSink:
    """Hands entries to its sink in their order, each once."""

    def __init__(
        self,
        name: str,
        open_sink: Callable[[int], Sink],
        start_step: int,
        *,
        reopen: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the sink; where that fails, try again later. Raises open_sink's UserError.

        open_sink: gets the step of the last entry that was handed on. reopen: open the sink again after a failed write, because its
        writer cannot be used any more.
        """
        self.name = name
        self._open, self._reopen, self._clock = open_sink, reopen, clock
        self._sink: Sink | None = None
        self._last_step = start_step
        self._waiting: deque[Entry] = deque(maxlen=KEPT)
        self._num_dropped = 0
        self._pause, self._next_try = FIRST_PAUSE, -float("inf")
        self._failing = False
        self._attempt(lambda: None, raise_mistakes=True)

    def write(self, entry: Entry) -> None:
        """Hand the entry on, after those that wait; or let it wait too."""
        self._num_dropped += len(self._waiting) == KEPT
        self._waiting.append(entry)
        self._hand_on()

    def flush(self) -> None:
        self._hand_on()
        if self._sink is not None and not self._failing:
            self._attempt(self._sink.flush)

    def close(self) -> None:
        """Try once more, without a pause, and report how many entries are lost."""
        self._next_try = -float("inf")
        self._hand_on()
        lost = self._num_dropped + len(self._waiting)
        if self._sink is not None:
            self._attempt(self._sink.close)
        if lost:
            self._report(f"warning: {self.name}: {lost} entries could not be written and are lost")

    def _hand_on(self) -> None:
        if self._waiting and self._clock() >= self._next_try:
            self._attempt(self._send_all)

    def _send_all(self) -> None:
        assert self._sink is not None
        while self._waiting:
            entry = self._waiting[0]
            self._sink.write(entry)
            self._last_step = entry["step"]
            self._waiting.popleft()
        if self._failing:
            self._sink.flush()

    def _attempt(self, action: Callable[[], None], raise_mistakes: bool = False) -> None:
        """Open the sink where it is closed, then act. What either raises is reported; a UserError is raised where `raise_mistakes`."""
        try:
            if self._sink is None:
                self._sink = self._open(self._last_step)
            action()
        except Exception as error:  # a log's library may raise anything
            if raise_mistakes and isinstance(error, UserError):
                raise
            self._failed(error)
            return
        if self._failing:
            self._report(f"{self.name} is written again")
        self._failing, self._pause = False, FIRST_PAUSE

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._report(f"warning: {self.name} cannot be written ({lines[0]}); the run goes on and tries again")
        self._failing = True
        self._next_try = self._clock() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if self._reopen and self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
            self._sink = None

    def _report(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
