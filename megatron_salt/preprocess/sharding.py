"""Dividing files among independent jobs by their sizes. Pure."""

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
    """The files of shard i of n, at most as many as files: consecutive ones, at least one, so that shards in order hold all files in
    order. A file goes where its middle lies when all bytes are cut into n equal parts, as far as every shard gets one."""
    i, n = shard
    assert 0 <= i < n <= len(sizes), (shard, len(sizes))
    total, before, home, homes = max(sum(sizes), 1), 0, -1, []
    for number, size in enumerate(sizes):
        wanted = (2 * before + size) * n // (2 * total)
        home = min(
            max(wanted, home, n - len(sizes) + number), home + 1, n - 1
        )  # the files that are left must do for the shards that are
        homes.append(home)
        before += size
    return range(homes.index(i), homes.index(i) + homes.count(i))
