"""The coordinates of each rank.

A Layout maps global ranks to (pp, dp, cp, tp) coordinates, pp slowest and tp fastest: Megatron's order tp-cp-ep-dp-pp. It
may also name the rank of each place; so a teacher is laid over the ranks of its student (`salt/routing.py`).
Arithmetic on ints: it needs no torch.distributed, and gives the same answer on every rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_salt.config import ParallelConfig
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class Coordinates:
    """The index of a rank in each dimension."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """The sizes of the four dimensions. Their product is the number of ranks."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1

    ranks: tuple[int, ...] | None = None
    """The global rank at each place, in Megatron's order of places. None: place n has rank n."""

    def __post_init__(self) -> None:
        assert min(self.tensor, self.context, self.data, self.pipeline) >= 1, self
        assert self.ranks is None or sorted(self.ranks) == list(range(self.world_size)), self

    @property
    def sizes(self) -> dict[str, int]:
        """The four sizes by name."""
        return {"tensor": self.tensor, "context": self.context, "data": self.data, "pipeline": self.pipeline}

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a global rank."""
        assert 0 <= rank < self.world_size, (rank, self)
        return self._coordinates(rank if self.ranks is None else self.ranks.index(rank))

    def rank(self, at: Coordinates) -> int:
        """The global rank at these coordinates."""
        place = at.tp + self.tensor * (at.cp + self.context * (at.dp + self.data * at.pp))
        return place if self.ranks is None else self.ranks[place]

    def groups(self, *varying: str) -> list[list[int]]:
        """The partition of all ranks into groups whose members differ only in the named dimensions ("tp", "cp", "dp", "pp").

        Groups and their members are in the order of places, as in megatron-core's RankGenerator.
        """
        fixed = [name for name in ("tp", "cp", "dp", "pp") if name not in varying]
        groups: dict[tuple[int, ...], list[int]] = {}
        for place in range(self.world_size):
            at = self._coordinates(place)
            groups.setdefault(tuple(getattr(at, name) for name in fixed), []).append(self.rank(at))
        return list(groups.values())

    def _coordinates(self, place: int) -> Coordinates:
        rest, tp = divmod(place, self.tensor)
        rest, cp = divmod(rest, self.context)
        pp, dp = divmod(rest, self.data)
        return Coordinates(tp, cp, dp, pp)

    def replica(self, rank: int) -> list[int]:
        """The ranks that hold one copy of the model, `rank` among them."""
        return next(group for group in self.groups("tp", "cp", "pp") if rank in group)


def world_size_from_environment() -> int:
    """Number of ranks that the launcher started; 1 without a launcher. Needs no torch.distributed."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def student_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """Arrange `world_size` ranks as the flags say. Data parallelism has world_size / (tp x pp x cp) ranks."""
    ranks = parallel.replica_ranks
    if world_size % ranks:
        raise UserError(
            f"{world_size} ranks cannot hold whole replicas of --tensor-model-parallel-size {parallel.tensor_model_parallel_size} "
            f"x --pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x --context-parallel-size "
            f"{parallel.context_parallel_size} = {ranks} ranks; start a multiple of {ranks}"
        )
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        context=parallel.context_parallel_size,
        data=world_size // ranks,
        pipeline=parallel.pipeline_model_parallel_size,
    )


def context_slice(length: int, context: int, rank: int) -> list[slice]:
    """The positions of a sequence that context-parallel rank r of n holds: chunks r and 2n-1-r of 2n. It balances causal attention."""
    if context == 1:
        return [slice(0, length)]
    assert length % (2 * context) == 0, (length, context)
    chunk = length // (2 * context)
    other = 2 * context - 1 - rank
    return [slice(rank * chunk, (rank + 1) * chunk), slice(other * chunk, (other + 1) * chunk)]
