"""Exceptions that end a program with one line and a status of their own.

Raised with a message that names the flag, the file and the numbers; the entry points print it without a
traceback and exit with the class's status. Everything else that is raised is a bug of ours or of a library and keeps its traceback.
"""

from typing import Literal


class UserError(ValueError):
    """A mistake in flags, files or environment, described for the person who made it. Another start would only repeat it."""

    status = 2
    """What the process exits with."""
    outcome: Literal["refused", "unsaved", "nonfinite"] | None = "refused"
    """The word in --outcome-file: train/outcome.py. None: no word, as for a run that died."""


class SaveError(UserError):
    """The last checkpoint is not on disk, or not whole. Nobody's mistake: another start may fare better."""

    status = 3
    outcome: Literal["refused", "unsaved", "nonfinite"] | None = "unsaved"


class NonFiniteError(UserError):
    """Loss or parameters are not finite. Another start from the same checkpoint would most likely come to the same."""

    status = 4
    outcome: Literal["refused", "unsaved", "nonfinite"] | None = "nonfinite"


class LostRankError(UserError):
    """A rank did not join, or is gone. Nobody's mistake: another start may fare better, so it counts as a run that died."""

    status = 1
    outcome: Literal["refused", "unsaved", "nonfinite"] | None = None
