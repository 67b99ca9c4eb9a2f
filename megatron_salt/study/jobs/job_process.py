"""The process of one job on this machine: starts its program, ends it when the study leaves or dies, and tells how it ended.

    python -m megatron_salt.study.jobs.job_process --directory DIR --ranks 2 --trains --parent 4711 -- -m megatron_salt.pretrain ...

It runs while the job runs. At SIGTERM, or when the study is gone, the ranks get SIGTERM once: a run saves and leaves. Ranks that are not
done after --leave-seconds are killed. No process of the job outlives this one. stdout and stderr are the job's log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from megatron_salt.checkpoint.save_directory import whole_checkpoints
from megatron_salt.errors import UserError
from megatron_salt.files import sole_writer
from megatron_salt.study.job import goes_on
from megatron_salt.study.jobs.outcome import last_error, read_outcome
from megatron_salt.train.launcher import Word, write_outcome

LEAVE_SECONDS = 240.0
"""Seconds that a run has to save after SIGTERM"""
POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between looks at all processes of the machine
_OF_STATUS: dict[int, Word] = {0: "done", 2: "refused", 3: "unsaved", 4: "nonfinite", 5: "machine"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the flags name. Returns 0 where it is done, else 1."""
    parser = argparse.ArgumentParser(prog="job_process", description="One job of a study, as the study starts it.")
    parser.add_argument("--directory", type=Path, required=True, help="where the outcome file goes")
    parser.add_argument("--ranks", type=int, required=True, help="processes; 0: a program without ranks")
    parser.add_argument("--trains", action="store_true", help="the program takes --outcome-file")
    parser.add_argument("--parent", type=int, required=True, help="process id of the study")
    parser.add_argument("--leave-seconds", type=float, default=LEAVE_SECONDS, help="time to save after SIGTERM")
    parser.add_argument("command", nargs="+", help="arguments of Python, after --")
    given = parser.parse_args(argv)
    with _alone(given.directory, given.leave_seconds):
        return run_job(given)


def run_job(given: argparse.Namespace) -> int:
    """`main`, while nobody else runs this job."""
    outcome = given.directory / "outcome.txt"
    outcome.unlink(missing_ok=True)
    own = ["--outcome-file", str(outcome)] if given.trains else []
    asked = _note_signals()
    log, begun = given.directory / "log.txt", _size(given.directory / "log.txt")
    command = list(given.command)
    if given.trains and whole_checkpoints(given.directory):  # also one that an earlier start wrote while this one waited
        command = list(goes_on(command))
    program = _Program(launcher(given.ranks) + command + own, given.ranks)
    leaving = _follow(program, asked, given.parent, given.leave_seconds)
    if read_outcome(outcome) is None:
        word, reason = _verdict(program.process.returncode, leaving, given.trains)
        error = None if word in ("done", "left") else last_error(log, begun)
        write_outcome(str(outcome), word, None, reason if error is None else f"{error} ({reason})")
    found = read_outcome(outcome)
    return 0 if found is not None and found.word == "done" else 1


@contextlib.contextmanager
def _alone(directory: Path, seconds: float) -> Iterator[None]:
    """Hold the job. Jobs of a study that was killed go on while they save: wait for that. Raises UserError where it takes longer."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(sole_writer("job", directory / "job"))
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
        yield


def launcher(ranks: int) -> list[str]:
    """The interpreter, and torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(torchrun if ranks > 1 else [])]


def _verdict(status: int, leaving: bool, trains: bool) -> tuple[Word, str]:
    """The word and the reason of a program that wrote none. Pure."""
    words = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    if status == 0 and not trains:
        return "done", "finished"
    if leaving:
        return "left", f"told to leave{' before it had anything to save' if trains else ''} ({words})"
    return ("died" if trains else _OF_STATUS.get(status, "died")), words


@dataclass
class _Program:
    """A program and the ranks that torchrun starts for it, each in a session of its own. Invariant: `end` leaves none of them alive."""

    command: list[str]
    ranks: int
    process: subprocess.Popen[bytes] = field(init=False)
    descendants: dict[int, psutil.Process] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)

    def look(self) -> list[psutil.Process]:
        """Its direct children now; all descendants are remembered, since they lose their parent when it dies."""
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            self.descendants |= {child.pid: child for child in own.children(recursive=True)}
            return own.children()
        return []

    def ask_to_leave(self) -> bool:
        """Send SIGTERM to the ranks, not to torchrun, which would kill them after 30 s. False: there is no rank yet."""
        targets = self.look() if self.ranks > 1 else [psutil.Process(self.process.pid)]
        for target in targets:
            with contextlib.suppress(psutil.Error):
                target.send_signal(signal.SIGTERM)
        return bool(targets)

    def end(self) -> None:
        """Kill what is left."""
        self.look()
        for process in self.descendants.values():
            with contextlib.suppress(psutil.Error):  # psutil refuses a pid that another process has got by now
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _note_signals() -> list[int]:
    """Install the handlers. Returns a list to which each SIGTERM is added."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study passes Ctrl-C on as SIGTERM
    return asked


def _follow(program: _Program, asked: Sequence[int], parent: int, leave_seconds: float) -> bool:
    """Wait for the program's end. Returns whether it was asked to leave."""
    leaving_since, has_told, next_look = None, False, 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(POLL_SECONDS)
            break
        if time.monotonic() > next_look:
            program.look()
            next_look = time.monotonic() + LOOK_SECONDS
        if leaving_since is None and (asked or os.getppid() != parent):
            leaving_since = time.monotonic()
        if leaving_since is not None:
            has_told = has_told or program.ask_to_leave()
            if time.monotonic() - leaving_since > leave_seconds:
                break
    program.end()
    return leaving_since is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
