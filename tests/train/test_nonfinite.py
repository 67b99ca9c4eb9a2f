"""A step whose gradient is not finite on any rank leaves parameters and optimizer unchanged; N in a row end the run.

A microbatch of one rank is poisoned: a label that is no id, which the head answers with NaN, or a mask or a gradient that is not finite.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import UserError
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.train.nonfinite import NonFiniteWatch
from megatron_salt.train.step import StepOutcome, Student, train_step, unwrap
from tests.support.checkpoint_runs import Left, expect, left
from tests.support.ranks import run_ranks
from tests.support.small import GLOBAL_BATCH, MODELS, Case, batch, build_student, train_student

PLAIN = ParallelConfig()
OVERLAP = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
CASES = [
    (2, Case(PLAIN)),
    (2, Case(PLAIN, dtype=torch.bfloat16)),
    (2, Case(replace(OVERLAP, ddp_bucket_size=2_000))),
    (2, Case(OVERLAP, dtype=torch.bfloat16)),
    (2, Case(replace(OVERLAP, context_parallel_size=2), MODELS["untied"])),
    (4, Case(replace(OVERLAP, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), dtype=torch.bfloat16)),
    (4, Case(replace(PLAIN, pipeline_model_parallel_size=2, tensor_model_parallel_size=2))),
]


def poisoned(student: Student, case: Case, step: int, how: str = "label") -> list[Microbatch]:
    """The microbatches of a step; the second one of the last replica has a token that makes its loss not finite."""
    microbatches = batch(student, case, step)
    if student.mesh.at.dp == student.mesh.layout.data - 1:
        bad = microbatches[1]
        labels, mask = bad.labels.clone(), bad.loss_mask.clone()
        mask[0, 3] = {"label": 1.0, "nan mask": math.nan, "infinite mask": math.inf}[how]
        if how == "label":
            labels[0, 3] = -1
        microbatches[1] = replace(bad, labels=labels, loss_mask=mask)
    return microbatches


def step_through(case: Case, world_size: int, how: str | None, look: bool) -> dict[str, Any]:
    """Train a step, a bad one if `how`, and two more; with `look`, hash everything before and after the bad one."""
    student = build_student(case, world_size)
    train_student(student, case, 1)
    seen: dict[str, Any] = {}
    if how:
        before = left(student, None, []) if look else None
        consumed = student.scheduler.num_steps
        outcome = train_step(student, poisoned(student, case, 50, how), PhaseTimer())
        seen = dict(norm=outcome.grad_norm, applied=outcome.applied, advanced=student.scheduler.num_steps - consumed)
        seen["untouched"] = before == left(student, None, []) if look else None
    curve = train_student(student, case, 2, start=1)
    return seen | dict(curve=curve, left=left(student, None, []))


def same(one: Left, other: Left) -> bool:
    return (one.weights, one.optimizer) == (other.weights, other.optimizer)


@pytest.mark.long
@pytest.mark.parametrize("world_size, case", CASES)
def test_a_bad_step_leaves_parameters_and_optimizer_bit_for_bit_and_the_run_goes_on(world_size, case):
    """Oracle: a run that never saw the bad batch. Learning rate and data advance, so the schedule alone differs."""
    never = run_ranks(world_size, step_through, case, world_size, None, False)
    for look in (False, True):  # looking gathers parameters, so a run that is not looked at counts too
        ranks = run_ranks(world_size, step_through, case, world_size, "label", look)
        for rank, clean in zip(ranks, never, strict=True):
            assert not math.isfinite(rank["norm"]) and not rank["applied"]
            assert rank["untouched"] is (True if look else None)
            assert rank["advanced"] == GLOBAL_BATCH
            assert rank["curve"] == clean["curve"] and all(math.isfinite(loss) for loss in clean["curve"].losses)
            assert same(rank["left"], clean["left"])


@pytest.mark.parametrize("how", ["nan mask", "infinite mask"])
def test_whatever_is_not_finite_counts(how):
    (first, second) = run_ranks(2, step_through, Case(OVERLAP), 2, how, True)
    assert not first["applied"] and not second["applied"] and first["untouched"] and second["untouched"]


def end_of_run(case: Case, world_size: int, limit: int, good_between: bool) -> tuple[list[bool], str]:
    """Whether each step was applied, and what ended the run."""
    student, watch, applied = build_student(case, world_size), NonFiniteWatch(limit, 0), []

    def run() -> None:
        for step in range(1, 10):
            good = step == 1 or (good_between and step == 3)
            microbatches = batch(student, case, step) if good else poisoned(student, case, step)
            outcome = train_step(student, microbatches, PhaseTimer())
            applied.append(outcome.applied)
            watch.note(step, outcome, microbatches, student.mesh)

    return applied, expect(UserError, run)


@pytest.mark.long
@pytest.mark.parametrize("parallel, world_size, culprit, samples", [
    (OVERLAP, 2, 1, "10, 11"),
    (replace(PLAIN, pipeline_model_parallel_size=2), 4, 3, "10, 11"),  # the last stage of the second replica
    (replace(PLAIN, tensor_model_parallel_size=2), 2, 0, "2, 3"),
])  # fmt: skip
def test_bad_steps_in_a_row_end_the_run_and_say_where(parallel, world_size, culprit, samples):
    for applied, message in run_ranks(world_size, end_of_run, Case(parallel), world_size, 3, False):
        assert applied == [True, False, False, False]
        assert "in 3 steps in a row (--max-nonfinite-steps 3), the last one step 4" in message
        assert f"rank {culprit}, microbatch 1 (samples {samples}) had loss nan" in message
        assert "Parameters are those of step 1" in message
        assert message.count("had loss") == parallel.tensor_model_parallel_size


def test_a_good_step_between_starts_the_count_again():
    for applied, message in run_ranks(2, end_of_run, Case(OVERLAP), 2, 3, True):
        assert applied == [True, False, True, False, False, False] and "the last one step 6" in message


def overflow(case: Case, world_size: int) -> tuple[bool, bool, str]:
    """A gradient that overflows on rank 1 alone, in backward, where every loss is finite."""
    student = build_student(case, world_size)
    if student.mesh.rank == 1:
        unwrap(student.chunks[0]).decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = left(student, None, [])
    microbatches = batch(student, case, 0)
    outcome = train_step(student, microbatches, PhaseTimer())
    message = expect(UserError, lambda: NonFiniteWatch(1, 0).note(1, outcome, microbatches, student.mesh))
    return outcome.applied, before == left(student, None, []), message


def test_a_gradient_that_overflows_in_backward_is_told_from_a_bad_loss():
    for applied, untouched, message in run_ranks(2, overflow, Case(OVERLAP, dtype=torch.bfloat16), 2):
        assert not applied and untouched
        assert "every microbatch's loss was finite, so the gradients overflowed in backward" in message


def test_the_count_continues_where_a_checkpoint_left_it():
    watch = NonFiniteWatch(limit=3, in_a_row=1)
    none = torch.zeros(1, 1)
    microbatch = Microbatch(
        tokens=none, labels=none, loss_mask=none, position_ids=none, documents=None, sample_ids=np.array([0])
    )
    watch.note(7, StepOutcome(math.nan, False, None), [microbatch], None)  # type: ignore[arg-type]
    assert watch.in_a_row == 2
