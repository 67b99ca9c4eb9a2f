"""Small agreements between ranks: one answer everywhere, and one error everywhere.

A process that has joined no world agrees with itself: a --dry-run asks what a start asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_salt.errors import UserError
from megatron_salt.parallel.device import current_device

T = TypeVar("T")


def from_rank_0(action: Callable[[], T]) -> T:
    """Rank 0's result of `action`, on every rank; its UserError or OSError is raised on every rank. Collective over all ranks."""
    return from_rank(0, action)


def from_rank(rank: int, action: Callable[[], T]) -> T:
    """Another rank's, in the same way. `rank` is the same on all."""
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
    """Every rank's value, by rank. Collective over all ranks."""
    if not dist.is_initialized():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem on every rank; None where no rank has one. Collective over all ranks."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(everyone) if one is not None), None)


def largest(value: int) -> int:
    """The largest of every rank's int. Collective over all ranks."""
    tensor = torch.tensor(value, dtype=torch.int64, device=current_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
