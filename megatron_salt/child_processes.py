"""Processes that multiprocessing starts for this one: none outlives its parent, and none of them answers Ctrl-C with a traceback.

Standard library alone: a process that is spawned imports this module and nothing else of the package.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

POLL_SECONDS = 0.2


def end_with_parent() -> None:
    """Start a thread that kills this process and its own children as soon as its parent has ended, however that ended. In the child."""
    threading.Thread(target=_watch_parent, name="watch of the parent process", daemon=True).start()


def parent_is_gone() -> bool:
    """Whether the process that started this one by multiprocessing has ended. In the child."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


def _watch_parent() -> None:
    while not parent_is_gone():
        time.sleep(POLL_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


@contextlib.contextmanager
def holding_interrupts() -> Iterator[None]:
    """Processes that are started inside get no SIGINT until they call `end_at_interrupt`. This one gets it when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_interrupt() -> None:
    """Let SIGINT end this process, and processes that it starts, at once and without a word, unless it is ignored. In the child."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
