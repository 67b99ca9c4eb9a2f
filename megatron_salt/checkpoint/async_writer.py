"""One torch_dist save: planned, written by a forked process of every rank (waited for or not), and finished with one verdict.

A rank whose disk is full must not leave the others waiting: whatever fails on one rank is known to all of them when `finish`
returns, a process that was killed while it wrote too. Each writer also checksums the shards that it wrote, in the process that wrote them.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_salt.checkpoint.integrity import FileSum, sum_of_file, write_whole
from megatron_salt.checkpoint.safe_unpickle import COMMON
from megatron_salt.checkpoint.sharded_state import State
from megatron_salt.parallel.collectives import first_problem, from_rank_0
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mcore_compat import begin_sharded_save, quiet_checkpointing

CORE_CONFIG = "metadata.json"
CORE_CONFIG_CONTENT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
_SIGNALLED = 128  # plus the signal's number: the exit status of a process whose own process died of it
_PATIENCE = 30.0  # seconds until the file system must show rank 0 what other ranks wrote


@dataclass
class Write:
    """A planned save. `request` is megatron-core's AsyncRequest."""

    directory: Path
    request: Any
    sums: SimpleQueue
    process: BaseProcess | None = None
    """The one that writes, as soon as there is one; None also where this rank has nothing to write."""


def on_rank_0(action: Callable[[], None]) -> str | None:
    """Run `action` on rank 0 alone; an OSError there is told to every rank. Collective over all ranks."""
    try:
        from_rank_0(action)
    except OSError as error:
        return f"rank 0: {describe(error)}"
    return None


def describe(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}"


def plan(state: State, directory: Path, groups: ProcessGroupCollection) -> Write:
    """Decide who writes what, so that the data- and context-parallel ranks share the work. Collective over all ranks.

    Tensors on a GPU are copied when the write starts; those on the CPU are read while it runs, which a forked process does
    from its own snapshot. `directory` exists and is seen by every rank.
    """
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), groups.dp_cp)
    force_all_tensors_to_non_fp8(state)  # weights that the model has in FP8 alone are saved like any other
    with quiet_checkpointing():
        tensors, rest = save_preprocess(state)
        assert not rest, f"only tensors are saved, found {list(rest)}"
        request = begin_sharded_save(strategy, tensors, directory)
    sums: SimpleQueue = multiprocessing.get_context("fork").SimpleQueue()
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write_and_sum, request.async_fn, directory, dist.get_rank(), sums))
    return Write(directory, request, sums)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Processes started inside never hear the signals at which a run saves and leaves. Slurm sends them to every process of a job, and
    the ones that are writing, which the run waits for, must not die of them. To this process they come when the block ends."""
    resource_tracker.ensure_running()  # Python starts it with the first process, and unblocks SIGTERM behind our back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_core_files(directory: Path) -> dict[str, FileSum]:
    """Write the two small files, without content of ours, by which any release of megatron-core knows its checkpoints. Rank 0 calls."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return {
        COMMON: write_whole(directory / COMMON, buffer.getvalue()),
        CORE_CONFIG: write_whole(directory / CORE_CONFIG, json.dumps(CORE_CONFIG_CONTENT).encode()),
    }


def write_later(write: Write, queue: AsyncCallsQueue, publish: Callable[[], None]) -> None:
    """Begin to write this rank's shards; the queue calls `publish` after all ranks have. Errors come out of `finish`."""
    queue.schedule_async_request(write.request._replace(finalize_fns=[publish]))
    write.process = queue.async_calls[-1].async_caller.process


def write_now(write: Write) -> None:
    """Write this rank's shards, in a process that may be killed without this one. Errors come out of `finish`."""
    request = write.request
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    if request.async_fn is not None:
        with quiet_checkpointing():
            write.process = multiprocessing.get_context("fork").Process(target=request.async_fn, args=arguments)
            write.process.start()
            write.process.join()


def finish(write: Write) -> tuple[dict[str, FileSum], str | None]:
    """After every rank has written: write `.metadata`, collect the sums. What went wrong, if anything. Collective."""
    problem = None
    try:
        for finalize in write.request.finalize_fns:
            finalize()
    except CheckpointException as error:  # megatron-core raises it on every rank, with the reasons on rank 0
        reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items())]
        problem = reasons[0] if reasons else None
    except OSError as error:
        # Rank 0 could not write .metadata, and the other ranks wait for the verdict that megatron-core broadcasts after it.
        dist.broadcast(torch.ones(1, dtype=torch.int, device=current_device()), src=0)
        problem = f"rank 0: {describe(error)}"
    mine = {} if write.sums.empty() else write.sums.get()
    death = None if write.process is None else _death(write.process.exitcode)
    everyone: list[tuple[dict[str, FileSum], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, problem))
    death = first_problem(death)  # of which megatron-core's own problem, results that are missing, only follows
    problems = [one for one in (death, *(one for _, one in everyone)) if one is not None]
    if problems:
        return {}, problems[0]
    sums = {name: one for part, _ in everyone for name, one in part.items()}
    return sums, _unseen(write.directory, sums)


def _write_and_sum(write: Callable[..., None], directory: Path, rank: int, sums: SimpleQueue, *arguments: Any) -> None:
    # megatron-core waits for ever for a process of its own that died: this one then dies too.
    threading.Thread(target=_die_with_child, name="watch of the writing process", daemon=True).start()
    write(*arguments)
    sums.put({path.name: sum_of_file(path) for path in directory.glob(f"__{rank}_*.distcp")})


def _die_with_child() -> None:
    while True:
        with contextlib.suppress(ChildProcessError):  # there is none: not yet, or not any more
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if child is not None and child.si_status:
                os._exit(child.si_status + (0 if child.si_code == os.CLD_EXITED else _SIGNALLED))
        time.sleep(0.2)


def _death(exitcode: int | None) -> str | None:
    """What is known of a writing process that did not end by itself, by its exit code."""
    if not exitcode:
        return None
    number = -exitcode if exitcode < 0 else exitcode - _SIGNALLED
    how = f"signal {number}" if number > 0 else f"exit status {exitcode}"
    return f"the process that writes the checkpoint died ({how}{'; out of memory?' if number == signal.SIGKILL else ''})"


def _unseen(directory: Path, sums: dict[str, FileSum]) -> str | None:
    """Rank 0 must see every rank's files, whole: --save on a disk of each node's own would be a checkpoint of nothing."""
    problem = None
    if dist.get_rank() == 0:
        deadline = time.monotonic() + _PATIENCE
        for name, one in sums.items():
            while (found := _size(directory / name)) != one.size and time.monotonic() < deadline:
                time.sleep(0.5)
            if found != one.size:
                problem = (
                    f"{directory / name} has {found} bytes here and {one.size} on the rank that wrote it; "
                    "--save must be on a file system that all nodes share"
                )
                break
    return first_problem(problem)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
