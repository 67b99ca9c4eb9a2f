"""The measured work of the head beside its products: the same on all ranks, more with a teacher, and without a trace in the run."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_salt.model.flops import HeadCost
from megatron_salt.parallel.mesh import new_group_of
from megatron_salt.salt.head_cost import measure_head
from tests.support.ranks import run_ranks


def measured(dtype: torch.dtype, rows: int) -> tuple[HeadCost, bool]:
    alone = new_group_of([[rank] for rank in range(dist.get_world_size())], timedelta(minutes=1), "alone")
    before = torch.get_rng_state()
    found = measure_head(dtype, rows, 64, 512, alone)
    return found, torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ranks_hear_the_same_and_a_teacher_is_more_work(dtype):
    of_ranks = run_ranks(2, measured, dtype, 2048)
    costs = [cost for cost, _ in of_ranks]
    assert costs[0] == costs[1] and all(untouched for _, untouched in of_ranks)
    assert all(math.isfinite(value) for value in (costs[0].plain, costs[0].distilled))
    assert 0 < costs[0].plain < costs[0].distilled  # more than twice as many passes over the logits


def test_one_row_and_one_token_can_be_measured():
    [(cost, _)] = run_ranks(1, measured, torch.float32, 1)
    assert cost.distilled > 0
