"""Dividing files among independent jobs by their sizes. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def files_of_shard(sizes: Sequence[int], shard: tuple[int, int]) -> range:
    """The files of shard i of n: consecutive ones, so that shards in order hold all files in order. A file belongs where the middle
    of it lies when all bytes are cut into n equal parts; a shard may get none."""
    i, n = shard
    total, before, homes = sum(sizes), 0, []
    for number, size in enumerate(sizes):
        middle = 2 * before + size  # twice the middle
        homes.append(min(middle * n // (2 * total), n - 1) if total else number * n // len(sizes))
        before += size
    mine = [number for number, home in enumerate(homes) if home == i]
    return range(mine[0], mine[-1] + 1) if mine else range(0)
