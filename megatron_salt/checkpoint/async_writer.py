"""One torch_dist save: planned, written by a forked process of every rank, and finished with one verdict.

A rank whose disk is full must not leave the others waiting. So whatever fails on one rank, all ranks know when `finish` returns, also where
a writing process was killed. Each writing process also computes the checksums of the shards that it wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.integrity import FileSum, sum_of_file, write_summed
from megatron_salt.checkpoint.safe_unpickle import COMMON
from megatron_salt.checkpoint.sharded_state import State
from megatron_salt.child_processes import end_at_interrupt, end_with_parent, holding_interrupts, parent_is_gone
from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.parallel.collectives import first_problem, from_rank_0
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mcore_compat import begin_sharded_save, quiet_checkpointing

log = logging.getLogger(__name__)

CORE_CONFIG = "metadata.json"
CORE_CONFIG_CONTENT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
_SIGNALLED = 128  # plus the signal's number: exit status of a process whose child died of that signal
_unread: list[Path] = []  # the save whose results `finish` has not read; a run that fails leaves it to the next one
_PATIENCE = 30.0  # seconds within which rank 0 must see the files that other ranks wrote


@dataclass
class Write:
    """A planned save. `request` is megatron-core's AsyncRequest."""

    directory: Path
    request: Any
    sums: SimpleQueue
    process: BaseProcess | None = None
    """The process that writes; None before it is started, and where this rank has nothing to write."""

    def is_under_way(self) -> bool:
        """Whether this rank's process is still writing."""
        return self.process is not None and self.process.is_alive()


def on_rank_0(action: Callable[[], None]) -> str | None:
    """Run `action` on rank 0 alone. Returns, on every rank, what its OSError said; None without an error. Collective over all ranks."""
    try:
        from_rank_0(action)
    except OSError as error:
        return f"rank 0: {describe(error)}"
    return None


def prepare_directory(save: Path) -> None:
    """Make --save, remove what crashed runs left there, and check that every rank can write in it. Raises UserError."""

    def prepare() -> None:
        save.mkdir(parents=True, exist_ok=True)
        for line in save_directory.tidy(save):
            log.warning("--save %s: %s", save, line)

    problem = on_rank_0(prepare) or first_problem(_try_to_write(save))
    if problem is not None:
        raise UserError(f"--save {save} cannot be written: {problem}")


def _try_to_write(save: Path) -> str | None:
    path = save / f".probe-{dist.get_rank()}"
    try:
        write_whole(path, b"probe", durable=True)
        path.unlink()
    except OSError as error:
        return describe(error)
    return None


def describe(error: BaseException) -> str:
    """An error in one line: its class and its message."""
    return f"{type(error).__name__}: {error}"


def plan(state: State, directory: Path, groups: ProcessGroupCollection) -> Write:
    """Decide which rank writes what: the data- and context-parallel ranks share the work. Collective over all ranks.

    Tensors on a GPU are copied when the write starts. Those on the CPU are read while it runs; the forked process has its own snapshot of
    them. `directory` exists and is visible to every rank.
    """
    if _unread or filesystem_async._results_queue is None:
        # megatron-core has one queue for a process. The results of a save that a failed run left would become this one's .metadata.
        filesystem_async._results_queue = _new_queue()
    _unread[:] = [directory]
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


def _new_queue() -> Any:
    """The queue that megatron-core would make, in a process that ends when this one is killed."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    return manager.Queue()  # it keeps the manager


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Block the signals at which a run saves and leaves, in this process and in processes that are started inside.

    Slurm sends the signals to every process of a job. Those that write a checkpoint must not die of them, since the run waits for them.
    This process gets the signals when the block ends.
    """
    resource_tracker.ensure_running()  # else Python starts it with the first process, which unblocks SIGTERM
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
        COMMON: write_summed(directory / COMMON, buffer.getvalue()),
        CORE_CONFIG: write_summed(directory / CORE_CONFIG, json.dumps(CORE_CONFIG_CONTENT).encode()),
    }


def write_later(write: Write, queue: AsyncCallsQueue, publish: Callable[[], None]) -> None:
    """Start to write this rank's shards. The queue calls `publish` after all ranks have written; `finish` reports errors."""
    with holding_interrupts():
        queue.schedule_async_request(write.request._replace(finalize_fns=[publish]))
    write.process = queue.async_calls[-1].async_caller.process


def write_now(write: Write) -> None:
    """Write this rank's shards, in a process that may be killed without harm to this one; `finish` reports errors."""
    request = write.request
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    if request.async_fn is not None:
        with quiet_checkpointing():
            write.process = multiprocessing.get_context("fork").Process(target=request.async_fn, args=arguments)
            with holding_interrupts():
                write.process.start()
            write.process.join()


def finish(write: Write) -> tuple[dict[str, FileSum], str | None]:
    """After every rank has written: write `.metadata` and collect the sums. Collective over all ranks.

    Returns the sums by file name, and a line about what went wrong; None where nothing did."""
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
    _unread.clear()
    own_sums = {} if write.sums.empty() else write.sums.get()
    death = None if write.process is None else _death(write.process.exitcode)
    everyone: list[tuple[dict[str, FileSum], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (own_sums, problem))
    death = first_problem(death)  # reported first: the missing results that megatron-core reports follow from it
    problems = [one for one in (death, *(one for _, one in everyone)) if one is not None]
    if problems:
        return {}, problems[0]
    sums = {name: one for part, _ in everyone for name, one in part.items()}
    return sums, _unseen(write.directory, sums)


def _write_and_sum(write: Callable[..., None], directory: Path, rank: int, sums: SimpleQueue, *arguments: Any) -> None:
    end_at_interrupt()
    end_with_parent()
    # megatron-core waits for ever for a child of this process that died, so this process must die with it.
    threading.Thread(target=_die_with_child, name="watch of the writing process", daemon=True).start()
    try:
        write(*arguments)
    except (OSError, EOFError):
        if parent_is_gone():  # and its queue with it
            os._exit(1)
        raise
    sums.put({path.name: sum_of_file(path) for path in directory.glob(f"__{rank}_*.distcp")})


def _die_with_child() -> None:
    while True:
        with contextlib.suppress(ChildProcessError):  # there is no child, or not yet
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if child is not None and child.si_status:
                os._exit(child.si_status + (0 if child.si_code == os.CLD_EXITED else _SIGNALLED))
        time.sleep(0.2)


def _death(exitcode: int | None) -> str | None:
    """A line about a writing process that did not end well, by its exit code; None where it did."""
    if not exitcode:
        return None
    number = -exitcode if exitcode < 0 else exitcode - _SIGNALLED
    how = f"signal {number}" if number > 0 else f"exit status {exitcode}"
    return f"the process that writes the checkpoint died ({how}{'; out of memory?' if number == signal.SIGKILL else ''})"


def _unseen(directory: Path, sums: dict[str, FileSum]) -> str | None:
    """A line about a file that rank 0 cannot see whole, as where --save is on a local disk of each node; None where it sees all."""
    problem = None
    if dist.get_rank() == 0:
        deadline = time.monotonic() + _PATIENCE
        for name, one in sums.items():
            while (size := _size(directory / name)) != one.size and time.monotonic() < deadline:
                time.sleep(0.5)
            if size != one.size:
                problem = (
                    f"{directory / name} has {size} bytes here and {one.size} on the rank that wrote it; "
                    "--save must be on a file system that all nodes share"
                )
                break
    return first_problem(problem)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
