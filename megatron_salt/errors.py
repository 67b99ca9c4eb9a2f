"""Exceptions that end a program with one line on stderr and an exit status of their own.

The message names the flag, the file and the numbers. Programs print it without a traceback and exit with the class's
status. Any other exception is a bug, of ours or of a library, and keeps its traceback.
"""

import difflib
import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import Literal

Outcome = Literal["refused", "unsaved", "nonfinite", "left", "machine"] | None
"""The word in --outcome-file, see train/launcher.py. None: the file is not written, as when a run dies."""


class UserError(ValueError):
    """A mistake of the user in flags, files or environment. Another start would repeat it."""

    status = 2
    """Exit status of the process."""
    outcome: Outcome = "refused"


class LeftEarly(UserError):
    """The run is asked to exit in a phase that saves nothing, such as loading. No mistake: another start goes on.

    Raised on every rank at the same place.
    """

    status = 0
    outcome: Outcome = "left"

    def __init__(self, reason: str, step: int | None = None) -> None:
        """step: the last complete step; None if unknown."""
        super().__init__(reason)
        self.reason, self.step = reason, step


class SaveError(UserError):
    """The last checkpoint is not on disk, or not complete. No mistake of the user: another start may succeed."""

    status = 3
    outcome: Outcome = "unsaved"


class NonFiniteError(UserError):
    """Loss or parameters are not finite. Another start from the same checkpoint would probably have the same result."""

    status = 4
    outcome: Outcome = "nonfinite"


class LostRankError(UserError):
    """A rank did not join, or died. No mistake of the user: another start may succeed, so the run counts as one that died."""

    status = 1
    outcome: Outcome = None


class MachineError(UserError):
    """This host cannot run what it was asked to: its GPU, driver, disk or installation. No mistake of the user: another host would do."""

    status = 5
    outcome: Outcome = "machine"

    def __init__(self, host: str, fault: str) -> None:
        """host: its name in Slurm, or its host name. fault: what is wrong there, with the device."""
        super().__init__(host, fault)
        self.host, self.fault = host, fault

    def __str__(self) -> str:
        return f"host {self.host} cannot be used: {self.fault}"


HOST_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ENXIO", "ENODEV", "ENOMEDIUM", "EUCLEAN", "EREMOTEIO", "ESTALE", "ENOTCONN", "ESHUTDOWN", "EHOSTDOWN", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""Errors of a disk, or of this host's way to a file server: another host may read the same file. Linux has all, macOS lacks some."""


def this_host() -> str:
    """The name of this host: Slurm's, by which a job can exclude it, or else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def file_error(message: str, error: OSError) -> UserError:
    """The error to raise where a file cannot be used: MachineError where `error` is a fault of this host, else UserError.

    message: one line that names the file. Call it on the host that saw `error`.
    """
    return MachineError(this_host(), message) if error.errno in HOST_FAULTS else UserError(message)


Look = Callable[[str], None]
"""Raises LeftEarly on every rank when the run is asked to exit. Its argument names the current phase. Collective over all ranks."""


def stay(doing: str) -> None:
    """The Look of a program that never exits early."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for a message that refuses `name`; empty if no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
