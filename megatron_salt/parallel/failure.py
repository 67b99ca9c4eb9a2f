"""The failure of one rank ends all ranks within seconds, and is in the log once.

A rank that raises writes its failure into the launch's store before its connections close. Only the first writer prints its error. A
thread of each other rank reads the store every two seconds. When it finds a failure, it gives the main thread five seconds to end, and
then ends the process with the same status. A killed rank writes nothing: the others see its connections close, and write that they
have seen it. Ranks that do not are the dead ones, unless this machine shows that they live: a rank may be slow on a crowded one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from megatron_salt.cli import exit_status
from megatron_salt.errors import LeftEarly, LostRankError, UserError
from megatron_salt.parallel.launch_store import Launch, StoreConnection, gone, launch_from_environment, listens, lives, named

POLL_SECONDS = 2.0  # between reads of the store
PATIENCE = (
    5.0  # seconds that a main thread has to end by itself, and that a failed rank tries to reach the store before it prints
)
RETRY_SECONDS = 60.0  # a failed rank goes on trying: rank 0, which hosts the store, may be late
LINGER = 30.0  # seconds that the process of the store waits at most until all other ranks have read the failure
_FAILED, _TOLD = "failed", "told"  # keys: the first failure; set when its rank needs the store no more
_ASKED = "asked"  # the value of _TOLD where that rank has waited for the silent ones
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed",
         "remote process exited")  # fmt: skip
"""Words of gloo's and NCCL's errors when another process is gone."""


@dataclass(frozen=True)
class Failure:
    """What a failed rank writes for the others."""

    rank: int
    host: str
    status: int
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.host} {'failed: ' if self.status else ''}{self.message}"


class PeerFailed(RuntimeError):
    """Another rank failed and has written its failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def fail_together(action: Callable[[], int | None]) -> int | None:
    """Run the program of a rank. If it fails, tell the other ranks. One rank prints the error, and all end with its status."""
    try:
        return action()
    except PeerFailed as error:
        launch = launch_from_environment()
        assert launch is not None
        return _follow(launch, None, error.failure)
    except Exception as error:
        launch = launch_from_environment()
        if launch is None or launch.world_size == 1:
            raise
        return _report(launch, error)


def refuse_failed(connection: StoreConnection) -> None:
    """Raise PeerFailed if another rank has failed."""
    if connection.store.check([_FAILED]):
        connection.store.set(f"seen/{connection.launch.rank}", "")
        raise PeerFailed(_read(connection))


@contextlib.contextmanager
def watching(launch: Launch) -> Iterator[None]:
    """Inside the block, a thread ends this process a few seconds after another rank failed.

    If the block raises after that, PeerFailed or LostRankError is raised instead.
    """
    # A connection of its own: a client serves one call at a time, and some calls wait for minutes.
    watch = _Watch(StoreConnection(launch))
    watch.start()
    try:
        yield
    except Exception as error:
        if watch.seen is not None:
            raise watch.seen from error
        raise
    finally:
        watch.ended.set()


class _Watch(threading.Thread):
    """Polls for the failure of another rank until `ended`. Invariant: a rank with a key seen/RANK in the store has it in `seen`."""

    def __init__(self, connection: StoreConnection) -> None:
        super().__init__(name="watch of other ranks", daemon=True)
        self.ended = threading.Event()
        self.seen: PeerFailed | LostRankError | None = None
        self._connection = connection

    def run(self) -> None:
        """Poll, and end the process after a failure."""
        launch = self._connection.launch
        while self.seen is None and not self.ended.wait(POLL_SECONDS):
            with contextlib.suppress(RuntimeError):  # torch's DistError: the next poll shows whether the connection is cut
                self._poll()
        # At a normal end the store also goes with rank 0; then the main thread of this rank ends soon as well.
        if self.seen is None or self.ended.wait(PATIENCE):
            return
        if isinstance(self.seen, PeerFailed):
            status = _follow(launch, self._connection, self.seen.failure)
        else:
            status = self.seen.status
            _print_without_store(launch, self.seen)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _poll(self) -> None:
        connection = self._connection
        if connection.is_cut():
            self.seen = LostRankError(gone(connection.launch))
        elif connection.store.check([_FAILED]):
            self.seen = PeerFailed(_read(connection))
            connection.store.set(f"seen/{connection.launch.rank}", "")


def _report(launch: Launch, error: Exception) -> int:
    """Report this rank's error, unless another rank has reported one. Returns the exit status."""
    lost, left = isinstance(error, LostRankError) or _is_lost(error), isinstance(error, LeftEarly)
    status = LostRankError.status if lost else error.status if isinstance(error, UserError) else 1
    own = Failure(launch.rank, socket.gethostname(), status, _line(error))
    begun = time.monotonic()
    connection = _reach(launch, 0.5 if lost or left else PATIENCE if launch.local_rank == 0 else 2 * PATIENCE)
    if connection is None and lost:
        _print_without_store(launch, error if isinstance(error, LostRankError) else LostRankError(gone(launch)))
        return status
    if connection is None:
        _print_error(error)
        if left:  # a rank that joins later gets the same signal, or waits until its timeout
            return status
        connection = _reach(launch, RETRY_SECONDS - (time.monotonic() - begun))
        with contextlib.suppress(RuntimeError):
            if connection is not None:
                _write_first(connection, own)
        return status
    try:
        first = _write_first(connection, own)
    except RuntimeError:  # torch's DistError: the store has just gone
        first = own
    if first != own:
        return _follow(launch, connection, first)
    asks = _is_lost(error)
    if asks:
        error = LostRankError(_message_of_lost(connection, error))
    with contextlib.suppress(RuntimeError):
        connection.store.set(_TOLD, _ASKED if asks else "")
    _print_error(error)
    if launch.hosts:
        _linger(connection, 2 * POLL_SECONDS if lost or left else LINGER)
    return status


def _follow(launch: Launch, connection: StoreConnection | None, failure: Failure) -> int:
    """End after the failure of another rank. Returns the exit status.

    One rank of each other node prints the failure in a line, because the full error is in the log of another node.
    """
    if launch.local_rank == 0 and failure.host != socket.gethostname():
        print(failure, file=sys.stderr, flush=True)
    if launch.hosts:
        with contextlib.suppress(RuntimeError, OSError):
            _linger(connection or StoreConnection(launch), 5 * POLL_SECONDS)
    return failure.status


def _print_without_store(launch: Launch, error: Exception) -> None:
    """Print the error on rank 1 and on one rank of each node: without a store ranks cannot agree on one."""
    if launch.local_rank == 0 or launch.rank == 1:
        _print_error(error)


def _print_error(error: Exception) -> None:
    def again() -> None:
        raise error

    if isinstance(error, UserError):
        exit_status(again)
    else:
        sys.stdout.flush()
        traceback.print_exception(error)
        sys.stderr.flush()


def _message_of_lost(connection: StoreConnection, error: Exception) -> str:
    """The message that names the ranks that do not answer, after a connection was lost."""
    try:
        dead = _silent(connection, 3 * POLL_SECONDS)
        hosts = sorted(
            {connection.store.get(f"host/{rank}").decode() for rank in dead if connection.store.check([f"host/{rank}"])}
        )
    except RuntimeError:  # torch's DistError
        return gone(connection.launch)
    if not dead:
        return f"a connection between ranks was lost, though all of them are alive: {_line(error)}"
    return f"{named(dead)}{' at ' if hosts else ''}{', '.join(hosts)} does not answer any more (killed? out of memory?): {_line(error)}"


def _reach(launch: Launch, seconds: float) -> StoreConnection | None:
    """A connection to the store; None if it cannot be reached within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if listens(launch):
            with contextlib.suppress(RuntimeError, OSError):
                return StoreConnection(launch)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.2)


def _write_first(connection: StoreConnection, own: Failure) -> Failure:
    """Write `own` unless there is a failure. Returns the first failure, which may be `own`."""
    first = connection.store.compare_set(_FAILED, "", json.dumps(asdict(own)))
    connection.store.set(f"seen/{connection.launch.rank}", "")
    return Failure(**json.loads(first))


def _read(connection: StoreConnection) -> Failure:
    return Failure(**json.loads(connection.store.get(_FAILED)))


def _linger(connection: StoreConnection, seconds: float) -> None:
    """In the process that hosts the store: wait until the rank that failed has told it and the others have seen it.

    Ranks that this process cannot see get `seconds`, or until they have been asked for; living ones of this machine get LINGER.
    """
    begun = time.monotonic()
    while True:
        told = connection.store.get(_TOLD).decode() if connection.store.check([_TOLD]) else None
        found = [lives(connection, rank) for rank in _unseen(connection)]
        waits = True in found or (None in found and told != _ASKED)
        limit = LINGER if True in found or told is None else seconds
        if (told is not None and not waits) or time.monotonic() - begun >= limit:
            return
        time.sleep(0.1)


def _silent(connection: StoreConnection, seconds: float) -> list[int]:
    """The ranks that have not seen the failure and are dead, as far as this process can see. Waits up to `seconds` for those that may
    live. Where all of them seem to live, one of them is on its way out: then all of them."""
    deadline = time.monotonic() + seconds
    while True:
        asked = {rank: lives(connection, rank) for rank in _unseen(connection)}
        found = {
            rank: asked[rank] for rank in _unseen(connection) if rank in asked
        }  # since then one may have seen it and ended
        if not any(state is not False for state in found.values()) or time.monotonic() >= deadline:
            return [rank for rank, state in found.items() if not state] or list(found)
        time.sleep(0.1)


def _unseen(connection: StoreConnection) -> list[int]:
    """The other ranks that have not seen the failure."""
    others = connection.launch.others
    if connection.store.check([f"seen/{rank}" for rank in others]):
        return []
    return [rank for rank in others if not connection.store.check([f"seen/{rank}"])]


def _is_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _line(error: Exception) -> str:
    text = " ".join((str(error).splitlines() or [""])[0].split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
