"""Run a function on several torch.distributed ranks: `run_ranks(4, function, *arguments)` gives one result a rank.

One pool of processes lives through the test session, grows to the largest world asked for and renews its workers every few
calls. Each call gets a fresh
gloo group (file:// rendezvous in a new directory) and leaves nothing behind: process groups, megatron-core's global state,
random state, environment and signal handlers are as before. What goes wrong in a rank is raised here as RankError, with
that rank's traceback: an exception, a hang (with every stuck rank's stack), a dead process. After a hang or a death the
pool is killed, and the next call starts another. Every worker computes on one thread, and on the CPU wherever it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import faulthandler
import functools
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = ("torch", "numpy", "pytest", "megatron_salt.parallel.cpu")
# megatron-core keeps these modules' state in globals, and parallel_state's own destroy function forgets some of them.
STATEFUL = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.random",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.rerun_state_machine",
    "megatron.core.pipeline_parallel.utils",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.cuda_graphs",
)
GRACE = 2.0  # seconds that the other ranks have to finish after one has failed
CLEAN_UP = 30.0  # seconds for taking a finished call down
MANY_THREADS = 64  # a worker with more still has groups of earlier calls, three threads each, and is replaced
CALLS = 6  # of one worker: megatron-core's DDP is never freed (its backward hooks close a cycle through C++), nor are its groups' threads


class RankError(RuntimeError):
    """At least one rank failed; the message has the tracebacks. `__cause__` is the first rank's exception where it pickles."""


class _Outcome(NamedTuple):
    """What one rank sends back: a pickled result or, when `trace` is not empty, a pickled exception (or nothing)."""

    payload: bytes
    trace: str


class _Call(NamedTuple):
    """What one rank is told to run."""

    rank: int
    world_size: int
    directory: str
    timeout: float
    path: list[str]
    payload: bytes  # pickled (function, arguments)


# ---- in the parent ----------------------------------------------------------------------------------------------------


class _Worker:
    """One process of the pool and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD + STATEFUL))
        self.pipe, remote = context.Pipe()
        # Not a daemon: daemons may have no children, and megatron-core's checkpoint writer is one.
        self.process = context.Process(target=_serve, args=(remote,), name="rank")
        with _environment(_worker_environment()):  # the fork server is launched by the first start() and keeps this environment
            self.process.start()
        remote.close()
        self.calls = 0

    def kill(self) -> None:
        """End the process and what it has started."""
        assert self.process.pid is not None
        for target in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                target(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


_pool: list[_Worker] = []


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` in `world_size` processes with gloo initialised; the results, by rank.

    `function` and `arguments` are pickled, so the function is one at the top level of a module; results come back pickled
    too. `timeout` is in seconds. Raises RankError.
    """
    payload = pickle.dumps((function, arguments))
    if any(not worker.process.is_alive() for worker in _pool):
        shutdown()
    while len(_pool) < world_size:
        _pool.append(_Worker())
    workers = _pool[:world_size]
    directory = tempfile.mkdtemp(prefix="ranks-")
    intact = False
    try:
        for rank, worker in enumerate(workers):
            _send(worker, _Call(rank, world_size, directory, timeout, list(sys.path), payload))
        outcomes = _collect(workers, timeout)
        if len(outcomes) < world_size:
            raise _error(workers, function, outcomes, directory, f"gave no answer in {timeout:g} s")
        for worker in workers:
            _send(worker, "clean up")
        left = _collect(workers, CLEAN_UP)
        intact = len(left) == world_size and not any(outcome.trace for outcome in left.values())
        if any(outcome.trace for outcome in outcomes.values()):
            raise _error(workers, function, outcomes, directory, "")
        if not intact:
            raise _error(workers, function, left, directory, f"was not cleaned up in {CLEAN_UP:g} s")
        intact = all(pickle.loads(outcome.payload) <= MANY_THREADS for outcome in left.values())
        return [pickle.loads(outcomes[rank].payload) for rank in range(world_size)]
    finally:
        if not intact:
            shutdown()
        for worker in workers:
            worker.calls += 1
            if worker.calls >= CALLS and worker in _pool:
                _pool.remove(worker)
                worker.kill()
        shutil.rmtree(directory, ignore_errors=True)


def shutdown() -> None:
    """Kill the pool, if there is one."""
    while _pool:
        _pool.pop().kill()


atexit.register(shutdown)  # else multiprocessing waits at exit for workers that wait for work

def _send(worker: _Worker, message: _Call | str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker is noticed by _collect
        worker.pipe.send_bytes(pickle.dumps(message))


def _collect(workers: list[_Worker], timeout: float) -> dict[int, _Outcome]:
    """One outcome a rank; fewer where ranks hang. Ends early, after a grace, when a rank has failed."""
    outcomes: dict[int, _Outcome] = {}
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
                outcomes[rank] = _Outcome(b"", f"died with {_exit(workers[rank])}\n")
            if outcomes[rank].trace:
                deadline = min(deadline, time.monotonic() + GRACE)
    return outcomes


def _exit(worker: _Worker) -> str:
    worker.process.join(GRACE)
    code = worker.process.exitcode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _error(workers: list[_Worker], function: Callable[..., Any], outcomes: dict[int, _Outcome], directory: str,
           late: str) -> RankError:
    """What went wrong: the failed ranks' tracebacks, then the stacks of the ranks that have not answered."""
    failed = [rank for rank, outcome in outcomes.items() if outcome.trace]  # in the order in which they failed
    stuck = [rank for rank in range(len(workers)) if rank not in outcomes]
    for rank in stuck:
        pid = workers[rank].process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    time.sleep(0.2 if stuck else 0.0)
    parts = [f"rank {rank}: {outcomes[rank].trace}" for rank in failed]
    parts += [f"rank {rank} was still running:\n{_stack_file(directory, rank).read_text()}" for rank in stuck
              if _stack_file(directory, rank).exists()]
    what = f"failed on rank {', '.join(map(str, failed))}" if failed else f"{late} on rank {', '.join(map(str, stuck))}"
    error = RankError(f"{function.__qualname__} {what} of {len(workers)}\n" + "\n".join(parts))
    if failed and outcomes[failed[0]].payload:
        error.__cause__ = pickle.loads(outcomes[failed[0]].payload)
    return error


# ---- in a worker ------------------------------------------------------------------------------------------------------


def _worker_environment() -> dict[str, str]:
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    # Gloo otherwise looks up the machine's own name, which need not resolve.
    return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "CUDA_VISIBLE_DEVICES": ""}


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory, f"stack-{rank}")


def _serve(pipe: Connection) -> None:
    """The life of a worker: call, outcome, clean up, outcome; until the parent is gone."""
    os.setpgrp()  # so that kill() also reaches this worker's children; and Ctrl-C is the parent's business
    import torch

    torch.set_num_threads(1)
    import megatron_salt.parallel.cpu  # noqa: F401  (before megatron)

    clean = [(module, _state(module)) for module in map(importlib.import_module, STATEFUL)]
    gc.collect()
    gc.freeze()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call = pickle.loads(pipe.recv_bytes())
            with _as_before(), _stack_on_demand(_stack_file(call.directory, call.rank)):
                pipe.send_bytes(pickle.dumps(_attempt(_work, call)))
                pipe.recv_bytes()  # every rank is done: nobody's last message is lost by closing connections
                outcome = _attempt(_take_down, clean)
            pipe.send_bytes(pickle.dumps(outcome))


def _attempt(action: Callable[..., Any], *arguments: Any) -> _Outcome:
    try:
        return _Outcome(pickle.dumps(action(*arguments)), "")
    except BaseException as error:  # SystemExit too: the worker has to go on
        try:
            payload = pickle.dumps(error)
            pickle.loads(payload)
        except Exception:
            payload = b""
        return _Outcome(payload, traceback.format_exc())


def _work(call: _Call) -> Any:
    import numpy
    import torch
    import torch.distributed as dist

    sys.path[:] = call.path
    rank, world_size = str(call.rank), str(call.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    dist.init_process_group("gloo", init_method=f"file://{call.directory}/rendezvous", rank=call.rank,
                            world_size=call.world_size, timeout=datetime.timedelta(seconds=call.timeout + 30))
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    function, arguments = pickle.loads(call.payload)
    return function(*arguments)


def _take_down(clean: list[tuple[Any, dict[str, Any]]]) -> int:
    """Destroy groups and put torch's and megatron-core's globals back; returns how many threads this process is left with."""
    import torch
    import torch.distributed as dist

    _forget_cached_calls()
    gc.collect()
    _break_cycles()
    gc.collect()
    if dist.is_initialized():
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        dist.destroy_process_group()
    for module, state in clean:
        vars(module).update({name: copy.copy(value) for name, value in state.items()})
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    return len(os.listdir("/proc/self/task"))


def _forget_cached_calls() -> None:
    """Empty megatron-core's lru_caches: one on a method keeps its object, and with it process groups and their threads."""
    for module in [module for name, module in sys.modules.items() if name.startswith("megatron")]:
        for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
            for value in vars(holder).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def _break_cycles() -> None:
    """megatron-core's DDP holds gradient accumulators whose hooks hold the DDP: a cycle through C++ that Python cannot collect."""
    from megatron.core.distributed import DistributedDataParallel

    for left in [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]:
        vars(left).clear()


def _state(module: Any) -> dict[str, Any]:
    """A module's globals that hold data, not code."""
    data = (type(None), bool, int, float, str, list, dict, set)
    items = ((name, value) for name, value in vars(module).items() if not name.startswith("__"))
    return {name: copy.copy(value) for name, value in items if isinstance(value, data)}


@contextlib.contextmanager
def _stack_on_demand(path: Path) -> Iterator[None]:
    """SIGUSR2 writes the main thread's stack to `path`, even while it waits inside a collective."""
    with open(path, "w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=False)
        yield
        faulthandler.unregister(signal.SIGUSR2)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Put the process's own settings back afterwards."""
    directory, path, argv = os.getcwd(), list(sys.path), list(sys.argv)
    log, log_level = list(logging.root.handlers), logging.root.level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    with _environment({}), warnings.catch_warnings():
        yield
    os.chdir(directory)
    sys.path[:], sys.argv[:] = path, argv
    logging.root.handlers[:] = log
    logging.root.setLevel(log_level)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.enable()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
