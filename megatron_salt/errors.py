"""Exceptions that end a program with one line and a status of their own.

Raised with a message that names the flag, the file and the numbers; the entry points print it without a
traceback and exit with the class's status. Everything else that is raised is a bug of ours or of a library and keeps its traceback.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Literal

Outcome = Literal["refused", "unsaved", "nonfinite", "left"] | None
"""The word in --outcome-file, see train/launcher.py; None: no word, as for a run that died."""


class UserError(ValueError):
    """A mistake in flags, files or environment, described for the person who made it. Another start would only repeat it."""

    status = 2
    """What the process exits with."""
    outcome: Outcome = "refused"


class LeftEarly(UserError):
    """There is a reason to leave in the middle of a phase that saves nothing. Nobody's mistake, and another start goes on; raised on
    every rank at the same place."""

    status = 0
    outcome: Outcome = "left"

    def __init__(self, reason: str, step: int | None = None) -> None:
        """step: the last one done, where that is known."""
        super().__init__(reason)
        self.reason, self.step = reason, step


class SaveError(UserError):
    """The last checkpoint is not on disk, or not whole. Nobody's mistake: another start may fare better."""

    status = 3
    outcome: Outcome = "unsaved"


class NonFiniteError(UserError):
    """Loss or parameters are not finite. Another start from the same checkpoint would most likely come to the same."""

    status = 4
    outcome: Outcome = "nonfinite"


class LostRankError(UserError):
    """A rank did not join, or is gone. Nobody's mistake: another start may fare better, so it counts as a run that died."""

    status = 1
    outcome: Outcome = None


Look = Callable[[str], None]
"""Raises LeftEarly, on every rank, where there is a reason to leave; its argument says what is under way. Collective over all ranks."""


def stay(doing: str) -> None:
    """The Look of a program that nobody tells to leave."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for a message that refuses `name`; empty where nothing known is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
