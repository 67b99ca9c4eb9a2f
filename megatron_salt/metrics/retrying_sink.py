"""A sink that never ends a run: what it cannot take is kept and offered again, later and later; said once, and again when it is over.

Only a user's mistake, a UserError while it opens, is let through. Everything else that a log's library, disk or server raises is told.
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
"""Entries that wait at most; the oldest go first."""


class Patient:
    """Hands entries on in their order, each once."""

    def __init__(
        self,
        name: str,
        open_sink: Callable[[int], Sink],
        start_step: int,
        *,
        anew: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the sink, or put that off. open_sink: gets the last step that was handed on. anew: open it again after a failed
        write, for one whose writer is of no more use then. Raises open_sink's UserError."""
        self.name = name
        self._open, self._anew, self._clock = open_sink, anew, clock
        self._sink: Sink | None = None
        self._last_step = start_step
        self._waiting: deque[Entry] = deque(maxlen=KEPT)
        self._num_dropped = 0
        self._pause, self._next_try = FIRST_PAUSE, -float("inf")
        self._failing = False
        self._attempt(lambda: None, mistakes_pass=True)

    def write(self, entry: Entry) -> None:
        """Hand it on, after what waits; or let it wait."""
        self._num_dropped += len(self._waiting) == KEPT
        self._waiting.append(entry)
        self._hand_on()

    def flush(self) -> None:
        self._hand_on()
        if self._sink is not None and not self._failing:
            self._attempt(self._sink.flush)

    def close(self) -> None:
        """Try once more, whatever the time, and tell how many entries are lost."""
        self._next_try = -float("inf")
        self._hand_on()
        lost = self._num_dropped + len(self._waiting)
        if self._sink is not None:
            self._attempt(self._sink.close)
        if lost:
            self._tell(f"warning: {self.name}: {lost} entries could not be written and are lost")

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

    def _attempt(self, action: Callable[[], None], mistakes_pass: bool = False) -> None:
        """Open the sink where it is not, and act. Whatever either raises is told, but for a user's mistake where that may pass."""
        try:
            if self._sink is None:
                self._sink = self._open(self._last_step)
            action()
        except Exception as error:  # libraries of logs raise what they like
            if mistakes_pass and isinstance(error, UserError):
                raise
            self._failed(error)
            return
        if self._failing:
            self._tell(f"{self.name} is written again")
        self._failing, self._pause = False, FIRST_PAUSE

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            said = str(error).strip().splitlines() or [type(error).__name__]
            self._tell(f"warning: {self.name} cannot be written ({said[0]}); the run goes on and tries again")
        self._failing = True
        self._next_try = self._clock() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if self._anew and self._sink is not None:
            with contextlib.suppress(Exception):
                self._sink.close()
            self._sink = None

    def _tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
