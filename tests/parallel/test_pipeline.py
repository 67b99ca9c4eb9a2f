"""A pipeline gives the sums of each microbatch, in order, to the last stage only; a forward-only run leaves no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.train.step import Student, forward_input, forward_step
from tests.support.ranks import run_ranks
from tests.support.small import Case, batch, build_student, save_weights


def sums(student: Student, case: Case, which: slice, forward_only: bool) -> list[list[float]]:
    inputs = [forward_input(microbatch, student.mesh) for microbatch in batch(student, case, 0)[which]]
    run = run_pipeline(
        student.chunks, forward_step, inputs, student.mesh, student.seq_length, student.micro_batch_size, forward_only
    )
    return [metrics.tolist() for metrics in run]


def gradient(student: Student) -> float:
    return sum(float(buffer.grad_data.abs().sum()) for chunk in student.chunks for buffer in chunk.buffers)


def one_by_one(case: Case, directory: Any) -> list[list[float]]:
    student = build_student(case, 1)
    save_weights(student, directory)
    return [sums(student, case, slice(number, number + 1), True)[0] for number in range(8)]


def at_once(case: Case, world_size: int, directory: Any) -> dict[str, Any]:
    student = build_student(case, world_size, directory)
    seen: dict[str, Any] = dict(last=student.mesh.is_last_stage)
    with torch.no_grad():
        seen["forward"] = sums(student, case, slice(None), True)
    seen["idle"] = gradient(student)
    seen["both"] = sums(student, case, slice(None), False)
    seen["moved"] = gradient(student)
    return seen


@pytest.mark.parametrize("sizes, world_size", [
    ({}, 1),
    (dict(pipeline_model_parallel_size=2), 2),
    (dict(pipeline_model_parallel_size=4), 4),
    (dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), 2),
])  # fmt: skip
def test_sums_come_in_order_to_the_last_stage(tmp_path, sizes, world_size):
    """Oracle: one rank, one microbatch at a time."""
    expected = run_ranks(1, one_by_one, Case(), tmp_path)[0]
    assert len({loss for _, loss, *_ in expected}) == len(expected)
    for rank in run_ranks(world_size, at_once, Case(ParallelConfig(**sizes)), world_size, tmp_path):
        for way in ("forward", "both"):
            assert len(rank[way]) == (len(expected) if rank["last"] else 0)
            for ours, theirs in zip(rank[way], expected, strict=False):
                assert ours == pytest.approx(theirs, rel=1e-6)
        assert rank["idle"] == 0 and rank["moved"] > 0
