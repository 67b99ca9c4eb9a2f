"""The largest of the ints of all ranks: at once, and begun now to be read later."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_salt.parallel.collectives import begin_largest, largest
from tests.support.ranks import run_ranks
from tests.train.test_waiting import Waits


def several_questions(values: list[list[int]]) -> list[int]:
    """Two questions under way at a time, with other collectives between asking and reading."""
    own = values[dist.get_rank()]
    first, second = begin_largest(own[0]), begin_largest(own[1])
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [dist.get_world_size()] * 3
    third = largest(own[2])
    return [first(), second(), third]


@pytest.mark.parametrize("values", [[[0, 17, 5], [3, 0, 5]], [[-2, 0, 2**40], [-3, 0, 1]]])
def test_answers_are_the_maxima_whatever_happens_before_they_are_read(values):
    assert run_ranks(2, several_questions, values) == [[max(column) for column in zip(*values, strict=True)]] * 2


def begin_before_the_other_rank_does(begun: Path) -> int:
    """Rank 1 begins only when rank 0 has gone on."""
    while dist.get_rank() == 1 and not begun.exists():
        time.sleep(0.01)
    with Waits(()) as waits:
        answer = begin_largest(dist.get_rank())
    assert not waits.found
    begun.touch()
    return answer()


def test_no_rank_waits_for_the_others_until_it_reads(tmp_path):
    assert run_ranks(2, begin_before_the_other_rank_does, tmp_path / "begun") == [1, 1]
