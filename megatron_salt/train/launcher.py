"""--outcome-file: one line that tells a launcher how a run ended.

    done 208000 job 4711.2 after its last step

| word        | status | meaning |
| `done`      | 0 | the last step is done and, with --save, its checkpoint is on disk |
| `left`      | 0 | it saved, or had nothing to save yet, and wants to go on (a signal, a file, a time limit) |
| `refused`   | 2 | a mistake of the user's, which another start would only repeat |
| `unsaved`   | 3 | the last checkpoint is not on disk; another start may fare better |
| `nonfinite` | 4 | gradients (--max-nonfinite-steps), the last loss, parameters or the optimizer's state are not finite |
| `machine`   | 5 | a host cannot be used (its GPU, driver, disk or installation); its name stands in the place of the step |
| `died`      |   | whoever started it found no line when it had ended; written by a study (study/jobs/) alone |

Without a line the run died. A launcher decides by this line and not by the exit code, which torch, Slurm and signals set as well. It
names a new file at each start, so that it never reads the line of another job. Standard library alone.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Literal

from megatron_salt.files import whole_file

Word = Literal["done", "left", "refused", "unsaved", "nonfinite", "machine", "died"]

log = logging.getLogger(__name__)


def write_outcome(path: str | None, word: Word, at: int | str | None, reason: str) -> None:
    """Write the line, as a whole or not at all. Where several processes write, one line stays.

    at: the last step done, or the host of `machine`; None: neither.

    Nothing is written where `path` is None. On a full disk the line replaces blanks in a file that exists; a launcher can prepare one.
    An error of the disk is logged and raises nothing: the run then counts as one that died.
    """
    if path is None:
        return
    job, restart = os.environ.get("SLURM_JOB_ID", "-"), os.environ.get("SLURM_RESTART_COUNT", "0")
    line = f"{word} {'-' if at is None else at} job {job}.{restart} {' '.join(reason.split())}\n"
    own = Path(f"{path}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with whole_file(Path(path), temporary=own) as temporary:
            temporary.write_text(line, encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and _written_in_place(Path(path), line.encode()):
            return
        log.warning("--outcome-file %s cannot be written (%s): how the run ended is not in it", path, error)


def _written_in_place(path: Path, line: bytes) -> bool:
    """Replace the blanks in a file by the line, in one write. Returns whether that succeeded."""
    try:
        with open(path, "r+b", buffering=0) as file:
            room = os.fstat(file.fileno()).st_size
            if file.read().strip() or room < len(line):
                return False
            return os.pwrite(file.fileno(), line.rstrip(b"\n").ljust(room - 1) + b"\n", 0) == room
    except OSError:
        return False
