"""--shard: its value, and which files a shard gets.

All shards together get each file once, in order, and none gets much more than its part.
"""

from __future__ import annotations

import random
import re

import pytest

from megatron_salt.errors import UserError
from megatron_salt.preprocess.sharding import files_of_shard, parse_shard


@pytest.mark.parametrize("seed", range(200))
def test_shards_cover_all_files_in_order_and_none_is_empty(seed):
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 10, 1000, chance.randrange(10**12)]) for _ in range(chance.randrange(1, 40))]
    n = chance.randrange(1, len(sizes) + 1)
    shards = [files_of_shard(sizes, (i, n)) for i in range(n)]
    assert [number for shard in shards for number in shard] == list(range(len(sizes))) and all(shards)


def test_it_is_bytes_that_are_divided_and_not_files():
    sizes = [1] * 900 + [100] * 9
    assert [len(files_of_shard(sizes, (i, 2))) for i in range(2)] == [900, 9]
    sizes = random.Random(0).choices(range(1, 100), k=1000)
    shares = [sum(sizes[number] for number in files_of_shard(sizes, (i, 7))) for i in range(7)]
    assert max(shares) - min(shares) < 2 * max(sizes)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/0", "0/0", "a/b", "1/2/3", "", " 1/2", "\uff11/\uff12", "0.5/1"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--shard.*from 0 to n-1.*{re.escape(text)}"):
        parse_shard(text)
    assert parse_shard("0/1") == (0, 1) and parse_shard("07/16") == (7, 16)
