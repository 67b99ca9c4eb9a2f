"""Small collectives: the same answer, or the same error, on every rank.

They also work in a single process without torch.distributed, because --dry-run makes the checks of a start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_salt.errors import UserError
from megatron_salt.parallel.device import current_device, reach

T = TypeVar("T")


def from_rank_0(action: Callable[[], T]) -> T:
    """Rank 0's result of `action`, on every rank; its UserError or OSError is raised on every rank. Collective over all ranks."""
    return from_rank(0, action)


def from_rank(rank: int, action: Callable[[], T]) -> T:
    """The result of `action` on one rank, on every rank, see `from_rank_0`. `rank` is the same on all ranks."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == rank:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=rank)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks. Collective over all ranks."""
    if not dist.is_initialized():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, with its number, on every rank; None if no rank has one. Collective over all ranks."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(everyone) if one is not None), None)


def largest(value: int) -> int:
    """The largest of the ints of all ranks. Collective over all ranks."""
    return begin_largest(value)()


def begin_largest(value: int) -> Callable[[], int]:
    """Begin to find the largest of the ints of all ranks; the function returned waits for the answer. Collective over all ranks.

    Nothing here waits for the device: called a step later, the answer is long in host memory. Each rank calls it once.
    """
    # A kernel fills the tensor. A copy from pageable memory would wait for everything that the device still has to do.
    tensor = torch.full((), value, dtype=torch.int64, device=current_device())
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
    assert work is not None
    if not tensor.is_cuda:
        return partial(_after, work.wait, tensor)
    work.wait()  # orders the copy behind the reduction, on the device; the host goes on
    answer = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return partial(_after, partial(reach, arrived), answer)


def _after(wait: Callable[[], object], answer: torch.Tensor) -> int:
    wait()
    return int(answer)
