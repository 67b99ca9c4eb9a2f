"""The lock on a directory that a run writes into: `owner.json`. It needs nothing of the file system but an atomic create and rename.

The file names the owner, and a thread of the owner counts on in it every ten seconds. An owner is gone where its pid no longer runs on
this machine, where it is an earlier start of the same Slurm job, or where its count stood still while a newcomer watched for a minute.
Clocks are never compared. The owner counts through its open file, so it never overwrites a lock that replaced its own.
Standard library only; nothing here communicates: rank 0 calls.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_salt.errors import LeftEarly, UserError
from megatron_salt.small_files import parse_json, read_small

log = logging.getLogger(__name__)

LOCK = "owner.json"
BEAT = 10.0  # seconds between beats
WATCH = 60.0  # seconds without a beat after which an owner is gone
SETTLE = 0.5  # seconds after which two newcomers that took over at the same time see which of them was last
_LARGEST = 1 << 16
_DIGITS = 12  # digits of the count: every beat has the same length


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One process that writes into a directory."""

    host: str
    machine: str
    """Identifies the boot of the machine and the pid namespace: pids can be compared only where both are the same."""
    pid: int
    started: str
    """Start time of the process, in the kernel's ticks: it differs where another process has got the same pid."""
    job: str
    """Slurm's job id; empty outside Slurm."""
    start: tuple[int, int]
    """Slurm's restart count, and the count of examples/launch.sh's starts within it."""
    token: str
    """Identifies this lock."""

    def __str__(self) -> str:
        job = f" in Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


Verdict = Literal["take", "refuse", "watch"]


def myself(environment: Mapping[str, str]) -> Owner:
    """This process as an owner, from /proc and Slurm's variables. SALT_LAUNCH is JOB.RESTARTS.ATTEMPT, from examples/launch.sh."""
    pid, job = os.getpid(), environment.get("SLURM_JOB_ID", "")
    restarts, attempt = environment.get("SLURM_RESTART_COUNT", ""), ""
    if environment.get("SALT_LAUNCH", "").count(".") == 2:
        job, restarts, attempt = environment["SALT_LAUNCH"].split(".")
    start = (int(restarts) if restarts.isdecimal() else 0, int(attempt) if attempt.isdecimal() else 0)
    return Owner(
        host=socket.gethostname(), machine=_machine(), pid=pid, started=process_start(pid) or "", job=job, start=start,
        token=uuid.uuid4().hex,
    )  # fmt: skip


def decide(owner: Owner | None, own: Owner, find_start: Callable[[int], str | None], take_over: bool) -> tuple[Verdict, str]:
    """What a newcomer does about the owner that the lock names, and why. owner: None where the lock cannot be read.

    find_start: start time of the process with a pid on this machine; None where there is none. Pure but for that call.
    """
    if take_over:
        return "take", "--take-over-save says so"
    if owner is None:
        return "watch", "it cannot be read"
    if owner.job and owner.job == own.job and owner.start < own.start:
        return "take", "it is an earlier start of this job"
    if owner.machine and owner.machine == own.machine:
        if find_start(owner.pid) == owner.started:
            return "refuse", "it runs"
        return "take", "its process is gone"
    return "watch", "whether it runs cannot be seen from here"


def read(directory: Path) -> tuple[Owner | None, bytes]:
    """The owner that the directory's lock names, None where it names none, and the lock's content.

    Raises FileNotFoundError where there is no lock, UserError where it is something that no owner wrote.
    """
    try:
        content = read_small(directory / LOCK, _LARGEST)
    except ValueError as error:
        raise UserError(f"--save {directory}: {LOCK} is no run's: {error}; remove it") from None
    except OSError:
        if not (directory / LOCK).is_symlink():
            raise
        raise UserError(f"--save {directory}: {LOCK} is no run's: it is a link without a target; remove it") from None
    try:
        facts = parse_json(content)
        restarts, attempt = facts["start"]
        owner = Owner(
            host=str(facts["host"]), machine=str(facts["machine"]), pid=int(facts["pid"]), started=str(facts["started"]),
            job=str(facts["job"]), start=(int(restarts), int(attempt)), token=str(facts["token"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError):
        return None, content
    words = (owner.host, owner.machine, owner.started, owner.job, owner.token)
    return (owner if all(map(str.isprintable, words)) else None), content


def refuse_living(directory: Path) -> str | None:
    """Raise UserError where the directory has an owner that surely runs. Takes no lock.

    Returns a line about an owner that may be gone; None where there is no owner, or one that is gone."""
    try:
        owner, _ = read(directory)
    except OSError:
        return None
    verdict, why = decide(owner, myself(os.environ), process_start, take_over=False)
    if verdict == "refuse":
        raise UserError(_refusal(directory, owner))
    return None if verdict == "take" else f"owned by {owner or 'an owner that cannot be read'}; {why}, a start will watch it"


class Ownership:
    """The lock of this process on a directory, until `release`. Call `check` before every write: another run may have taken over.

    `is_lost` reports that from the next beat on, without reading the disk.
    """

    def __init__(self, directory: Path, owner: Owner, descriptor: int, beat: float) -> None:
        self._directory, self._owner, self._descriptor, self._interval = directory, owner, descriptor, beat
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner of --save", daemon=True)
        self._thread.start()

    def is_lost(self) -> bool:
        """Whether a beat has seen that another run has the directory."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise UserError where another run has the directory now."""
        if self._is_own():
            return
        try:
            other = str(read(self._directory)[0] or "an owner that cannot be read")
        except FileNotFoundError:
            other = f"somebody who removed {LOCK}"
        raise UserError(
            f"--save {self._directory} was taken over by {other}; this run, {self._owner}, writes no more there and ends"
        )

    def release(self) -> None:
        """Remove the lock, where it is still this process's own."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_own():
                (self._directory / LOCK).unlink()
        os.close(self._descriptor)

    def _is_own(self) -> bool:
        try:
            owner, _ = read(self._directory)
        except (FileNotFoundError, UserError):
            return False
        return owner is not None and owner.token == self._owner.token

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._interval):
            count += 1
            with contextlib.suppress(
                OSError
            ):  # the lock was replaced on another node, or the file system fails: `check` reports it
                _write(self._descriptor, self._owner, count)
            with contextlib.suppress(OSError):
                if not self._is_own():
                    self._lost.set()
                    return


@contextlib.contextmanager
def owned(directory: Path, own: Owner, take_over: bool, watch: float = WATCH, beat: float = BEAT) -> Iterator[Ownership]:
    """Hold the lock on the directory, which is made where it is missing. Raises UserError where another run has it, OSError where it
    cannot be written."""
    ownership = acquire(directory, own, take_over, watch, beat)
    try:
        yield ownership
    finally:
        ownership.release()


def acquire(
    directory: Path,
    own: Owner,
    take_over: bool,
    watch: float = WATCH,
    beat: float = BEAT,
    leaving: Callable[[], bool] = lambda: False,
) -> Ownership:
    """The same as `owned` for a caller who calls `release`. watch: seconds that an owner may stand still; a multiple of `beat`.

    leaving: asked while watching; where it is true, LeftEarly is raised.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            pass
        else:
            try:
                _write(descriptor, own, 0)
            except OSError:
                path.unlink()
                raise
            return Ownership(directory, own, descriptor, beat)
        try:
            owner, content = read(directory)
        except FileNotFoundError:
            continue  # released just now
        verdict, why = decide(owner, own, process_start, take_over)
        name = str(owner or f"an owner whose {LOCK} cannot be read")
        if verdict == "watch":
            log.warning("--save %s seems to be owned by %s; watching it for %g s", directory, name, watch)
            if not _stands_still(directory, content, watch, leaving):
                if not path.exists():
                    continue
                verdict = "refuse"
            why = f"it stood still for {watch:g} s"
        if verdict == "refuse":
            raise UserError(_refusal(directory, owner))
        log.warning("--save %s is taken over from %s: %s", directory, name, why)
        return _take_over(directory, own, beat)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None where there is none that still runs."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the field before is a name, which may hold anything
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc(5)


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # then pids cannot be compared


def _write(descriptor: int, owner: Owner, count: int) -> None:
    content = json.dumps({**asdict(owner), "beat": f"{count:0{_DIGITS}}"}) + "\n"
    os.pwrite(descriptor, content.encode(), 0)
    os.fsync(descriptor)


def _stands_still(directory: Path, content: bytes, watch: float, leaving: Callable[[], bool]) -> bool:
    """Whether the lock's content is the same for `watch` seconds."""
    end = time.monotonic() + watch
    while time.monotonic() < end:
        if leaving():
            raise LeftEarly(f"told to leave while watching the owner of --save {directory}")
        time.sleep(min(1.0, watch / 20))
        try:
            if read(directory)[1] != content:
                return False
        except FileNotFoundError:
            return False
    return True


def _take_over(directory: Path, own: Owner, beat: float) -> Ownership:
    new = directory / f"{LOCK}.{own.token}"
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        _write(descriptor, own, 0)
        os.replace(new, directory / LOCK)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    ownership = Ownership(directory, own, descriptor, beat)
    time.sleep(SETTLE)
    try:
        ownership.check()
    except UserError:
        ownership.release()
        raise
    return ownership


def _refusal(directory: Path, owner: Owner | None) -> str:
    return (
        f"--save {directory} is owned by {owner or f'a run whose {LOCK} cannot be read'}, which is writing there: give another --save, "
        "wait for its end, or take it away from that run with --take-over-save"
    )
