"""--shard: divides files among independent jobs by their sizes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_salt.errors import UserError


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` -> (i, n), 0 <= i < n. UserError naming --shard."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard takes i/n, such as 0/4 for the first of four: i counts from 0 to n-1; got {text}")
    return int(match[1]), int(match[2])


def files_of_shard(sizes: Sequence[int], shard: tuple[int, int]) -> range:
    """The numbers of the files of shard i of n: consecutive, at least one. n is at most the number of files.

    A file belongs to the shard that contains its midpoint when all files, end to end, are cut into n equal parts. It moves to a
    neighbour where a shard would get no file.
    """
    i, n = shard
    assert 0 <= i < n <= len(sizes), (shard, len(sizes))
    total, before, shard_of_file, shards = max(sum(sizes), 1), 0, -1, []
    for number, size in enumerate(sizes):
        wanted = (2 * before + size) * n // (2 * total)
        fewest = n - len(sizes) + number  # else later shards would have no file
        shard_of_file = min(max(wanted, shard_of_file, fewest), shard_of_file + 1, n - 1)
        shards.append(shard_of_file)
        before += size
    return range(shards.index(i), shards.index(i) + shards.count(i))
