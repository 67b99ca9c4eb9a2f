"""Which files a shard gets: all of them together get each file once, in order, and none gets much more than its share."""

from __future__ import annotations

import random

import pytest

from megatron_salt.preprocess.sharding import files_of_shard


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
