"""When a run saves and leaves before its end: a signal, a time limit, a file, a step.

Signals and clocks differ between ranks, so all ranks decide together. Each rank turns what it knows into a small integer. The largest
over all ranks counts, so every rank gives the same answer. No rank waits for it: the reduction begins after one step, and its answer is
read after the next. So a run leaves within one step after the step in which a reason came up. The reduction is passed in. This module
imports the standard library alone, so that signals can be caught before the slow imports begin.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_salt.errors import LeftEarly, UserError

LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of Slurm: SIGTERM at requeue and preemption; SIGUSR1 ahead of the time limit with --signal=USR1@seconds."""

_NONE, _TIME, _FILE, _TAKEN = 0, 1, 2, 1000  # a signal is _FILE + its number


class SignalWatch:
    """Records that a leave signal has arrived; the run goes on until it asks. Main thread only.

    Several signals count as one. A forked child, such as a background writer, dies of the signal as it would without this class.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the first signal; 0: none
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._note) for number in LEAVE_SIGNALS}

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The handler does no more than this: the main thread may be anywhere, even inside a lock of the logger.
        if os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received = number


@contextmanager
def leaving_with(status: int, exit_file: str | None) -> Iterator[SignalWatch]:
    """Watches signals while a tool works that the same command continues. A LeftEarly out of the block gets `status`.

    Raises UserError where `exit_file` (--exit-file) is there already.
    """
    refuse_exit_file(exit_file)
    watch = SignalWatch()
    try:
        yield watch
    except LeftEarly as left:
        left.status = status
        raise
    finally:
        watch.restore()


class ExitPlan:
    """Asks after every step, and before every batch of an evaluation, whether to save and leave.

    Invariant: at most one question is under way, and every rank asks and reads the same ones in the same order.
    """

    def __init__(
        self,
        *,
        exit_interval: int | None,
        exit_duration_in_mins: float | None,
        watch: SignalWatch | None,
        begin: Callable[[int], Callable[[], int]],
        started: float,
        clock: Callable[[], float] = time.monotonic,
        exit_file: str | None = None,
        looks: bool = True,
    ) -> None:
        """begin: starts to find the maximum of an int over all ranks (collective); what it returns waits for the answer. started:
        `clock()` when the program began. looks: whether this rank looks for the file.

        The configuration, and so whether `begin` is called, is the same on every rank.
        """
        self._exit_interval = exit_interval
        self._exit_duration_in_mins = exit_duration_in_mins
        self._watch = watch
        self._begin = begin
        self._answer: Callable[[], int] | None = None  # of the question under way
        self._agreed: str | None = None  # the reason that all ranks have agreed on; it stays
        self._started = started
        self._clock = clock
        self._exit_file, self._looks = exit_file, looks
        self._is_taken: Callable[[], bool] | None = None
        # The time limit is a reason from the first step on. Else a chain of jobs that are too short would make no progress.
        self._timed = False
        self.reason: str | None = None
        """The last reason to leave; None: there was none."""

    def leave_where(self, is_taken: Callable[[], bool]) -> None:
        """From now on also leave where `is_taken` says, on any rank, that another run has taken --save. All ranks call, or none."""
        self._is_taken = is_taken

    def reason_to_leave(self, step: int) -> str | None:
        """Why the run leaves after `step` steps; None: it goes on. The same on every rank. What a rank knows now, all hear next time.

        Collective over all ranks, unless nothing is saved and no reason but --exit-interval is configured.
        """
        self._timed = True
        if (reason := self.reason_to_stop_now()) is not None:
            return reason
        if self._exit_interval is not None and step % self._exit_interval == 0:
            self.reason = f"step {step} is a multiple of --exit-interval {self._exit_interval}"
            return self.reason
        return None

    def reason_to_stop_now(self) -> str | None:
        """The reasons that do not wait for the end of an evaluation: a signal, the file, a --save that was taken, and the time limit where
        a step was made.

        The same on every rank: the answer to what was asked last time. Collective as `reason_to_leave` is.
        """
        self.finish()
        if self._agreed is None:
            asked = (self._watch, self._exit_duration_in_mins, self._exit_file, self._is_taken)
            if any(one is not None for one in asked):
                self._answer = self._begin(self._local_code())
            return None
        self.reason = self._agreed
        return self.reason

    def finish(self) -> None:
        """Read the answer to the question that is under way; call it also when the run ends. Every rank calls."""
        if self._answer is not None:
            code, self._answer = self._answer(), None
            self._agreed = None if code == _NONE else self._words(code)

    def look(self, doing: str) -> None:
        """Before the first step: raise LeftEarly on every rank where a signal or the file is a reason to leave. Collective."""
        if self._watch is None and self._exit_file is None:
            return
        code = self._begin(self._local_code())()
        if code != _NONE:
            raise LeftEarly(f"{self._words(code)} while {doing}")

    def _words(self, code: int) -> str:
        if code == _TAKEN:
            return "--save was taken over"
        if code > _FILE:
            return _received(code - _FILE)
        if code == _FILE:
            return _appeared(self._exit_file)
        return f"--exit-duration-in-mins {self._exit_duration_in_mins} is over"

    def _local_code(self) -> int:
        if self._is_taken is not None and self._is_taken():
            return _TAKEN  # before any other reason, since nothing can be saved
        if self._watch is not None and self._watch.received:
            return _FILE + self._watch.received
        if self._exit_file is not None and self._looks and os.path.lexists(self._exit_file):
            return _FILE
        minutes = self._exit_duration_in_mins
        return _TIME if self._timed and minutes is not None and self._clock() - self._started >= 60 * minutes else _NONE


def reason_alone(watch: SignalWatch | None, exit_file: str | None) -> str | None:
    """A signal or the file, as this rank alone sees them: for the time in which it cannot ask the others."""
    if watch is not None and watch.received:
        return _received(watch.received)
    return _appeared(exit_file) if exit_file is not None and os.path.lexists(exit_file) else None


def _received(number: int) -> str:
    return f"{signal.Signals(number).name} received"


def _appeared(exit_file: str | None) -> str:
    return f"--exit-file {exit_file} has appeared"


def refuse_exit_file(path: str | None) -> None:
    """Raise UserError where --exit-file exists: the run would leave at once, and a launcher would start it again and again."""
    if path is not None and os.path.lexists(path):
        raise UserError(f"--exit-file {path} is there, so this would leave at once; delete it to go on")
