"""One rank's failure ends all of them within seconds, and stands in the log once.

A rank that raises writes that into the launch's store, before its connections close; the first to write speaks. A thread of every
other rank looks there every two seconds, lets the main thread five to end by itself, and ends the process with the same status.
A rank that was killed writes nothing: others see its connections close, and the ranks that do not confirm that are the dead ones.
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
from megatron_salt.parallel.launch_store import Launch, StoreConnection, gone, launch_from_environment, listens, named

LOOK_EVERY = 2.0  # seconds between looks at the store
PATIENCE = 5.0  # seconds in which a main thread may end by itself, and in which a rank that failed looks for the store before it speaks
TELL_FOR = 60.0  # seconds in which it goes on looking: rank 0, which hosts the store, may be late
LINGER = 30.0  # seconds for which the store's own process waits until all others have read
_FAILED, _ASKED = "failed", "asked"  # the first failure; set when every rank was asked whether it lives
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed",
         "remote process exited")  # fmt: skip
"""What gloo and NCCL say when another process is gone."""


@dataclass(frozen=True)
class Failure:
    """What a rank that failed tells the others."""

    rank: int
    host: str
    status: int
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.host} {'failed: ' if self.status else ''}{self.message}"


class PeerFailed(RuntimeError):
    """Another rank failed, and has said so."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def with_one_voice(action: Callable[[], int | None]) -> int | None:
    """Run a rank's program. Where it fails, tell the other ranks; one of them speaks, and all end with its status."""
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
        return _tell(launch, error)


def refuse_failed(connection: StoreConnection) -> None:
    """Raise PeerFailed where another rank has failed."""
    if connection.store.check([_FAILED]):
        connection.store.set(f"seen/{connection.launch.rank}", "")
        raise PeerFailed(_read(connection))


@contextlib.contextmanager
def watching(launch: Launch) -> Iterator[None]:
    """While the block runs, a thread ends this process a few seconds after another rank failed. Raises PeerFailed, LostRankError
    instead of whatever the block raises after that."""
    watch = _Watch(
        StoreConnection(launch)
    )  # a connection of its own: a client serves one call at a time, and some wait for minutes
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
    """Looks for another rank's failure until `ended`. Invariant: who is noted in the store as having seen it has it in `seen`."""

    def __init__(self, connection: StoreConnection) -> None:
        super().__init__(name="watch of other ranks", daemon=True)
        self.ended = threading.Event()
        self.seen: PeerFailed | LostRankError | None = None
        self._connection = connection

    def run(self) -> None:
        """The thread."""
        launch = self._connection.launch
        while self.seen is None and not self.ended.wait(LOOK_EVERY):
            with contextlib.suppress(RuntimeError):  # torch's DistError: the next look says whether the connection is cut
                self._look()
        # The store goes with rank 0 also at a normal end, which the main thread then has behind it soon.
        if self.seen is None or self.ended.wait(PATIENCE):
            return
        if isinstance(self.seen, PeerFailed):
            status = _follow(launch, self._connection, self.seen.failure)
        else:
            status = self.seen.status
            _speak_for_many(launch, self.seen)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _look(self) -> None:
        connection = self._connection
        if connection.is_cut():
            self.seen = LostRankError(gone(connection.launch))
        elif connection.store.check([_FAILED]):
            self.seen = PeerFailed(_read(connection))
            connection.store.set(f"seen/{connection.launch.rank}", "")


def _tell(launch: Launch, error: Exception) -> int:
    """Say what happened, unless another rank has; the status to exit with."""
    lost, left = isinstance(error, LostRankError) or _is_lost(error), isinstance(error, LeftEarly)
    status = LostRankError.status if lost else error.status if isinstance(error, UserError) else 1
    mine = Failure(launch.rank, socket.gethostname(), status, _line(error))
    begun = time.monotonic()
    connection = _reach(launch, 0.5 if lost or left else PATIENCE if launch.local_rank == 0 else 2 * PATIENCE)
    if connection is None and lost:
        _speak_for_many(launch, error if isinstance(error, LostRankError) else LostRankError(gone(launch)))
        return status
    if connection is None:
        _speak(error)
        if left:  # whoever comes later is told to leave as this one was, or waits as long as it may
            return status
        connection = _reach(launch, TELL_FOR - (time.monotonic() - begun))
        with contextlib.suppress(RuntimeError):
            if connection is not None:
                _claim(connection, mine)
        return status
    try:
        first = _claim(connection, mine)
    except RuntimeError:  # torch's DistError: the store went just now
        first = mine
    if first != mine:
        return _follow(launch, connection, first)
    if _is_lost(error):
        error = LostRankError(_silent(connection, error))
    _speak(error)
    if launch.hosts:
        _linger(connection, 2 * LOOK_EVERY if lost or left else LINGER)
    return status


def _follow(launch: Launch, connection: StoreConnection | None, failure: Failure) -> int:
    """End after another rank's failure, in one line where that rank's own is in another node's log; the status to exit with."""
    if launch.local_rank == 0 and failure.host != socket.gethostname():
        print(failure, file=sys.stderr, flush=True)
    if launch.hosts:
        with contextlib.suppress(RuntimeError, OSError):
            _linger(connection or StoreConnection(launch), 5 * LOOK_EVERY)
    return failure.status


def _speak_for_many(launch: Launch, error: Exception) -> None:
    """Without a store nobody can ask who speaks: rank 1 does, and one rank of each node."""
    if launch.local_rank == 0 or launch.rank == 1:
        _speak(error)


def _speak(error: Exception) -> None:
    def again() -> None:
        raise error

    if isinstance(error, UserError):
        exit_status(again)
    else:
        sys.stdout.flush()
        traceback.print_exception(error)
        sys.stderr.flush()


def _silent(connection: StoreConnection, error: Exception) -> str:
    """Which ranks do not answer any more, after a connection was lost."""
    try:
        dead = _unseen(connection, 3 * LOOK_EVERY)
        connection.store.set(_ASKED, "")
        hosts = sorted(
            {connection.store.get(f"host/{rank}").decode() for rank in dead if connection.store.check([f"host/{rank}"])}
        )
    except RuntimeError:  # torch's DistError
        return gone(connection.launch)
    if not dead:
        return f"a connection between ranks was lost, though all of them are alive: {_line(error)}"
    return f"{named(dead)}{' at ' if hosts else ''}{', '.join(hosts)} does not answer any more (killed? out of memory?): {_line(error)}"


def _reach(launch: Launch, seconds: float) -> StoreConnection | None:
    """The store, where it can be reached within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if listens(launch):
            with contextlib.suppress(RuntimeError, OSError):
                return StoreConnection(launch)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.2)


def _claim(connection: StoreConnection, mine: Failure) -> Failure:
    """The first failure, which may be `mine`."""
    found = connection.store.compare_set(_FAILED, "", json.dumps(asdict(mine)))
    connection.store.set(f"seen/{connection.launch.rank}", "")
    return Failure(**json.loads(found))


def _read(connection: StoreConnection) -> Failure:
    return Failure(**json.loads(connection.store.get(_FAILED)))


def _linger(connection: StoreConnection, seconds: float) -> None:
    """In the process that hosts the store: wait until every other rank has seen the failure, or has been asked in vain."""
    deadline = time.monotonic() + seconds
    everybody = [f"seen/{rank}" for rank in connection.launch.others]
    while time.monotonic() < deadline and not connection.store.check(everybody) and not connection.store.check([_ASKED]):
        time.sleep(0.1)


def _unseen(connection: StoreConnection, seconds: float) -> list[int]:
    """Wait until every other rank has seen the failure; those that have not after `seconds`."""
    others = connection.launch.others
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not connection.store.check([f"seen/{rank}" for rank in others]):
        time.sleep(0.1)
    return [rank for rank in others if not connection.store.check([f"seen/{rank}"])]


def _is_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _line(error: Exception) -> str:
    text = " ".join((str(error).splitlines() or [""])[0].split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
