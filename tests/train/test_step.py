"""A step: recomputation repeats dropout, evaluation changes nothing, a batch without a token does no harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.train.evaluate import evaluate, means
from megatron_salt.train.state import ValidationSet
from megatron_salt.train.step import Student, train_step
from tests.support.checkpoint_runs import left
from tests.support.ranks import run_ranks
from tests.support.small import (
    GLOBAL_BATCH,
    MODELS,
    VOCABULARY,
    Case,
    Curve,
    batch,
    build_student,
    make_weights,
    train,
    train_student,
)

PLAIN = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2)
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
OVERLAP = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
DROPOUT = replace(MODELS["tied"], hidden_dropout=0.2, attention_dropout=0.2)
RECOMPUTE = [
    dict(recompute_granularity="selective"),
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
]


@pytest.mark.long
@pytest.mark.parametrize(
    "parallel, world_size", [(PLAIN, 1), (TP2, 2), (replace(TP2, sequence_parallel=True), 2), (INTERLEAVED, 2)]
)
def test_recomputation_drops_what_was_dropped(parallel, world_size):
    """Losses and gradient norms of three steps are those without recomputation, bit for bit; and dropout was on."""
    case = Case(parallel, DROPOUT)
    kept = run_ranks(world_size, train, case, world_size)[0]
    for recompute in RECOMPUTE if world_size == 1 else RECOMPUTE[:2]:
        recomputed = run_ranks(world_size, train, replace(case, parallel=replace(parallel, **recompute)), world_size)[0]
        assert recomputed == kept, recompute
    without = run_ranks(world_size, train, replace(case, model=MODELS["tied"]), world_size)[0]
    assert abs(kept.losses[0] - without.losses[0]) > 1e-4


@dataclass(frozen=True)
class HeldOut:
    """Batches by position, as `Batches` fetches them."""

    student: Student
    case: Case

    def fetch(self, consumed: int) -> Sequence[Microbatch]:
        return batch(self.student, self.case, 20 + consumed // GLOBAL_BATCH)


BYTES = torch.arange(VOCABULARY) % 5
"""Bytes that each id stands for."""


def evaluated(student: Student, case: Case, num_batches: int) -> dict[str, float]:
    batches: Any = HeldOut(student, case)
    return evaluate(student, ValidationSet(name="valid", batches=batches, num_batches=num_batches, byte_counts=BYTES))


def evaluate_weights(case: Case, world_size: int, weights: Any) -> dict[str, float]:
    return evaluated(build_student(case, world_size, weights), case, 2)


def slow_mean(case: Case, weights: Any) -> dict[str, float]:
    """The mean over the tokens of both batches, from the losses of training steps at learning rate 0."""
    student = build_student(replace(case, learning_rate=0.0), 1, weights)
    outcomes = [train_step(student, batch(student, case, step), PhaseTimer()) for step in (20, 21)]
    sums = sum(outcome.sums.double().sum(0) for outcome in outcomes if outcome.sums is not None)
    parts = [part for step in (20, 21) for part in batch(student, case, step)]
    counted = [(part.labels.flatten().tolist(), part.loss_mask.flatten().tolist()) for part in parts]
    read = sum(int(BYTES[label]) for labels, masks in counted for label, mask in zip(labels, masks, strict=True) if mask)
    return means(sums) | {"bits_per_byte": float(sums[1]) / math.log(2) / read}


@pytest.mark.parametrize("parallel, world_size", [
    (PLAIN, 1), (PLAIN, 2), (INTERLEAVED, 2), (replace(OVERLAP, context_parallel_size=2), 4),
    (replace(TP2, pipeline_model_parallel_size=2), 4),
])  # fmt: skip
def test_evaluation_is_the_mean_per_token_without_dropout_under_any_layout(tmp_path, parallel, world_size):
    """Every rank receives the mean."""
    case = Case(PLAIN, MODELS["tied"])
    run_ranks(1, make_weights, case, tmp_path / "w")
    expected = run_ranks(1, slow_mean, case, tmp_path / "w")[0]
    for figures in run_ranks(
        world_size, evaluate_weights, replace(case, model=DROPOUT, parallel=parallel), world_size, tmp_path / "w"
    ):
        assert figures == pytest.approx(expected, rel=1e-6)


def train_and_look(case: Case, world_size: int, look: bool) -> tuple[Curve, Any]:
    student = build_student(case, world_size)
    first = train_student(student, case, 2)
    if look:
        for _ in range(2):
            assert math.isfinite(evaluated(student, case, 1)["loss"])
        assert evaluated(student, case, 1) == evaluated(student, case, 1)
    second = train_student(student, case, 1, start=2)
    return Curve(first.losses + second.losses, first.grad_norms + second.grad_norms), left(student, None, [])


@pytest.mark.long
@pytest.mark.parametrize("parallel, world_size", [(PLAIN, 1), (replace(OVERLAP, ddp_bucket_size=2_000), 2), (INTERLEAVED, 2)])
def test_evaluation_leaves_no_trace(parallel, world_size):
    """It changes no parameter, optimizer or random state, and no parameter gather under way. Dropout is on again after it."""
    case = Case(parallel, DROPOUT)
    assert run_ranks(world_size, train_and_look, case, world_size, True) == run_ranks(
        world_size, train_and_look, case, world_size, False
    )


def step_without_tokens(case: Case, world_size: int) -> tuple[float, bool, bool]:
    student = build_student(case, world_size)
    train_student(student, case, 1)
    empty = [replace(part, loss_mask=torch.zeros_like(part.loss_mask)) for part in batch(student, case, 1)]
    outcome = train_step(student, empty, PhaseTimer())
    return (
        outcome.grad_norm,
        outcome.applied,
        all(math.isfinite(loss) for loss in train_student(student, case, 1, start=2).losses),
    )


def test_a_batch_without_a_valid_token_has_no_gradient():
    for grad_norm, applied, goes_on in run_ranks(2, step_without_tokens, Case(OVERLAP), 2):
        assert grad_norm == 0 and applied and goes_on


def train_deterministically(case: Case, world_size: int) -> Curve:
    """In torch's deterministic mode, which fills memory that nobody has written with NaN, also on a CPU."""
    torch.use_deterministic_algorithms(True)
    try:
        return train(case, world_size)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("parallel, world_size", [(OVERLAP, 1), (replace(TP2, sequence_parallel=True), 2)])
def test_deterministic_operations_train_as_the_others_do_and_nothing_reads_memory_that_nobody_wrote(parallel, world_size):
    case = Case(parallel)
    deterministic, plain = (
        run_ranks(world_size, function, case, world_size)[0] for function in (train_deterministically, train)
    )
    assert deterministic.losses == pytest.approx(plain.losses, rel=1e-5)
    assert deterministic.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
