"""Run a function on several torch.distributed ranks: `run_ranks(4, function, *arguments)` returns one result for each rank.

A pool of processes lives as long as the test session and grows to the largest world that a test asks for. Each call gets a new
gloo group (file:// rendezvous in a new directory), and is cleaned up after (`rank_worker.py`). An exception, a hang or the death of a
rank is raised as RankError, with that rank's traceback or stack. After a hang or a death the pool is killed, and the next call starts
another. Every worker computes on one thread, and on the
CPU wherever it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.support.rank_worker import STATEFUL, Call, Outcome, environment, serve, stack_file

PRELOAD = ("torch", "numpy", "pytest", "megatron_salt.parallel.cpu_seam", "torch._dynamo", "megatron_salt.train.run")
"""Modules that the fork server imports: the last two in place of each new process, whose first run imports them."""
GRACE = 2.0  # seconds that the other ranks have to finish after one has failed
CLEAN_UP = 30.0  # seconds for taking a finished call down
MANY_THREADS = 64  # a worker with more still has groups of earlier calls, three threads each, and is replaced


class RankError(RuntimeError):
    """At least one rank failed. The message has the tracebacks; `__cause__` is the exception of the first rank, if it can be pickled."""


class _Worker:
    """One process of a pool, and the pipe to it."""

    def __init__(self, loop: Callable[[Connection], None], start_method: str) -> None:
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload(list(PRELOAD + STATEFUL))
        self.pipe, remote = context.Pipe()
        # Not a daemon: daemons may have no children, and megatron-core's checkpoint writer is one.
        self.process = context.Process(target=loop, args=(remote,), name="rank")
        with environment(_worker_environment()):  # the fork server is launched by the first start() and keeps this environment
            self.process.start()
        remote.close()

    def kill(self) -> None:
        """Kill the process and the processes that it has started."""
        assert self.process.pid is not None
        for target in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                target(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


class Pool:
    """Processes that wait for calls. They are started when they are needed."""

    def __init__(self, loop: Callable[[Connection], None], start_method: str) -> None:
        """loop: what each process does, `rank_worker.serve` or something that ends in it. start_method: of multiprocessing."""
        self._loop, self._start_method = loop, start_method
        self._workers: list[_Worker] = []
        atexit.register(self.shutdown)  # else multiprocessing waits at exit for workers that wait for work

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """`run_ranks` in this pool."""
        payload = pickle.dumps((function, arguments))
        if any(not worker.process.is_alive() for worker in self._workers):
            self.shutdown()
        while len(self._workers) < world_size:
            self._workers.append(_Worker(self._loop, self._start_method))
        workers = self._workers[:world_size]
        directory = tempfile.mkdtemp(prefix="ranks-")
        intact = False
        try:
            for rank, worker in enumerate(workers):
                _send(worker, Call(rank, world_size, directory, timeout, list(sys.path), payload))
            outcomes = _collect(workers, timeout)
            if len(outcomes) < world_size:
                raise _error(workers, function, outcomes, directory, f"gave no answer in {timeout:g} s")
            for worker in workers:
                _send(worker, "clean up")
            left = _collect(workers, CLEAN_UP)
            cleaned_up = len(left) == world_size and not any(outcome.trace for outcome in left.values())
            intact = cleaned_up and all(pickle.loads(outcome.payload) <= MANY_THREADS for outcome in left.values())
            if any(outcome.trace for outcome in outcomes.values()):
                raise _error(workers, function, outcomes, directory, "")
            if not cleaned_up:
                raise _error(workers, function, left, directory, f"was not cleaned up in {CLEAN_UP:g} s")
            return [pickle.loads(outcomes[rank].payload) for rank in range(world_size)]
        finally:
            if not intact:
                self.shutdown()
            shutil.rmtree(directory, ignore_errors=True)

    def shutdown(self) -> None:
        """Kill the processes, if there are any."""
        while self._workers:
            self._workers.pop().kill()


_pool = Pool(serve, "forkserver")


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` in `world_size` processes with gloo initialised. Returns the results by rank.

    Function, arguments and results are pickled, so the function must be at the top level of a module. timeout: seconds. Raises RankError.
    """
    return _pool.run(world_size, function, *arguments, timeout=timeout)


def shutdown() -> None:
    """Kill the pool, if there is one."""
    _pool.shutdown()


def _send(worker: _Worker, message: Call | str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker is noticed by _collect
        worker.pipe.send_bytes(pickle.dumps(message))


def _collect(workers: list[_Worker], timeout: float) -> dict[int, Outcome]:
    """The outcome of each rank; fewer where ranks hang. When a rank has failed, the others get a short time to end."""
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(workers):
        waiting = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in outcomes}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]
            try:
                outcomes[rank] = pickle.loads(workers[rank].pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                outcomes[rank] = Outcome(b"", f"died with {_exit(workers[rank])}\n")
            if outcomes[rank].trace:
                deadline = min(deadline, time.monotonic() + GRACE)
    return outcomes


def _exit(worker: _Worker) -> str:
    worker.process.join(GRACE)
    code = worker.process.exitcode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _error(
    workers: list[_Worker], function: Callable[..., Any], outcomes: dict[int, Outcome], directory: str, late: str
) -> RankError:
    """An error with the tracebacks of failed ranks, then the stacks of ranks that have not answered."""
    failed = [rank for rank, outcome in outcomes.items() if outcome.trace]  # in the order in which they failed
    stuck = [rank for rank in range(len(workers)) if rank not in outcomes]
    for rank in stuck:
        pid = workers[rank].process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    time.sleep(0.2 if stuck else 0.0)
    parts = [f"rank {rank}: {outcomes[rank].trace}" for rank in failed]
    parts += [
        f"rank {rank} was still running:\n{stack_file(directory, rank).read_text()}"
        for rank in stuck
        if stack_file(directory, rank).exists()
    ]
    what = f"failed on rank {', '.join(map(str, failed))}" if failed else f"{late} on rank {', '.join(map(str, stuck))}"
    error = RankError(f"{function.__qualname__} {what} of {len(workers)}\n" + "\n".join(parts))
    if failed and outcomes[failed[0]].payload:
        error.__cause__ = pickle.loads(outcomes[failed[0]].payload)
    return error


def _worker_environment() -> dict[str, str]:
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    # Gloo otherwise looks up the machine's own name, which need not resolve.
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "CUDA_VISIBLE_DEVICES": ""}
