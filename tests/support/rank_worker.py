"""The worker processes of `ranks.py`: they run one call after another, and reset everything after each call.

After a call, `take_down` resets process groups, megatron-core's globals and caches, random state, environment, signal handlers and
whatever else a call may have changed.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import functools
import gc
import importlib
import logging
import os
import pickle
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

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


class Outcome(NamedTuple):
    """What a rank sends back: a pickled result or, if `trace` is not empty, a pickled exception (or nothing)."""

    payload: bytes
    trace: str


class Call(NamedTuple):
    """The function that one rank has to run, and its arguments."""

    rank: int
    world_size: int
    directory: str
    timeout: float
    path: list[str]
    payload: bytes  # pickled (function, arguments)


def stack_file(directory: str, rank: int) -> Path:
    return Path(directory, f"stack-{rank}")


def serve(pipe: Connection) -> None:
    """The loop of a worker: receive a call, send its outcome, clean up, send the outcome of that; until the parent is gone."""
    os.setpgrp()  # so that kill() also reaches this worker's children; and Ctrl-C is the parent's business
    import torch

    torch.set_num_threads(1)
    clean = globals_of_megatron()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call = pickle.loads(pipe.recv_bytes())
            with as_before(), _stack_on_demand(stack_file(call.directory, call.rank)):
                pipe.send_bytes(pickle.dumps(_attempt(_work, call)))
                pipe.recv_bytes()  # every rank is done: nobody's last message is lost by closing connections
                outcome = _attempt(take_down, clean)
            pipe.send_bytes(pickle.dumps(outcome))


def _attempt(action: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return Outcome(pickle.dumps(action(*arguments)), "")
    except BaseException as error:  # SystemExit too: the worker has to go on
        try:
            payload = pickle.dumps(error)
            pickle.loads(payload)
        except Exception:
            payload = b""
        return Outcome(payload, traceback.format_exc())


def _work(call: Call) -> Any:
    import numpy
    import torch
    import torch.distributed as dist

    sys.path[:] = call.path
    rank, world_size = str(call.rank), str(call.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",  # NCCL under virtual CUDA alone: the CPU's workers see no GPU
        init_method=f"file://{call.directory}/rendezvous",
        rank=call.rank,
        world_size=call.world_size,
        timeout=datetime.timedelta(seconds=call.timeout + 30),
    )
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    function, arguments = pickle.loads(call.payload)
    return function(*arguments)


def globals_of_megatron() -> list[tuple[Any, dict[str, Any]]]:
    """megatron-core's stateful modules and their globals now, for a later `take_down`."""
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    return [(module, _state(module)) for module in map(importlib.import_module, STATEFUL)]


def take_down(clean: list[tuple[Any, dict[str, Any]]]) -> int:
    """Destroy groups and restore the globals of torch and megatron-core. Returns how many threads this process still has."""
    import torch
    import torch.distributed as dist

    _forget_cached_calls()
    gc.collect()
    break_cycles()
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
    """Empty megatron-core's lru_caches. A cache on a method keeps its object alive, and so process groups and their threads."""
    for module in [module for name, module in sys.modules.items() if name.startswith("megatron")]:
        for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
            for value in vars(holder).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def break_cycles() -> None:
    """Free megatron-core's DDP. Its gradient accumulators have hooks that hold the DDP: a cycle through C++ that Python cannot free."""
    from megatron.core.distributed import DistributedDataParallel

    for left in [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]:
        vars(left).clear()


def _state(module: Any) -> dict[str, Any]:
    """The globals of a module that hold data, not code."""
    data = (type(None), bool, int, float, str, list, dict, set)
    items = ((name, value) for name, value in vars(module).items() if not name.startswith("__"))
    return {name: copy.copy(value) for name, value in items if isinstance(value, data)}


@contextlib.contextmanager
def _stack_on_demand(path: Path) -> Iterator[None]:
    """On SIGUSR2 write the main thread's stack to `path`, even while it waits in a collective."""
    with open(path, "w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=False)
        yield
        faulthandler.unregister(signal.SIGUSR2)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Restore the process's settings when the block ends."""
    directory, path, argv = os.getcwd(), list(sys.path), list(sys.argv)
    log, levels = list(logging.root.handlers), _levels_of_loggers()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    with environment({}), warnings.catch_warnings():
        yield
    os.chdir(directory)
    sys.path[:], sys.argv[:] = path, argv
    logging.root.handlers[:] = log
    for logger, level in levels.items():  # a logger that an import made keeps its level
        logger.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.enable()


def _levels_of_loggers() -> dict[logging.Logger, int]:
    logging.getLogger("megatron_salt")  # it is there from now on
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    return {one: one.level for one in (logging.root, *loggers)}


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
