"""The fused loss with a teacher equals full logits in float64: loss, metrics and both gradients, for any sharding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_salt.model.loss import METRICS
from tests.model.kd_loss.cases import (
    HIDDEN,
    ROWS,
    TEACHER_HIDDEN,
    Case,
    Inputs,
    Outputs,
    call,
    make_inputs,
    on_a_rank,
    oracle,
    own,
)
from tests.model.test_loss import relative_error
from tests.support.grids import grid
from tests.support.ranks import run_ranks

LAYOUTS = [(1, False), (2, False), (2, True), (4, True)]
GRID = grid(
    layout=LAYOUTS, dtype=(torch.float32, torch.bfloat16), chunk=(1, 7, 1000), vocabulary_size=(ROWS, 50, 30),
    mask=("all", "weights", "none"), temperature=(0.25, 1.0, 4.0), kd_weight=(0.0, 0.667, 1.0),
    where=lambda mask, temperature, kd_weight, **_: mask != "none" or (temperature, kd_weight) == (0.25, 0.667),
)  # fmt: skip


@pytest.mark.parametrize("layout, dtype, chunk, vocabulary_size, mask, temperature, kd_weight", GRID)
def test_loss_metrics_and_gradients_equal_full_logits(layout, dtype, chunk, vocabulary_size, mask, temperature, kd_weight):
    """With 30 of 64 ids the last rank (of four the last two) has only padding."""
    compare_with_oracle(Case(*layout, dtype, chunk, vocabulary_size, mask, temperature, kd_weight))


@pytest.mark.parametrize(
    "layout, shared_ids, temperature",
    [((1, False), 45, 0.25), ((2, True), 20, 1.0), ((4, True), 45, 4.0), ((4, False), 16, 0.25)],
)
def test_a_teacher_with_fewer_ids_gives_the_others_nothing(layout, shared_ids, temperature):
    """Where some ranks have none of the teacher's ids, too."""
    compare_with_oracle(Case(*layout, temperature=temperature, shared_ids=shared_ids))


def compare_with_oracle(case: Case, inputs: Inputs | None = None) -> None:
    inputs = make_inputs(case) if inputs is None else inputs
    dtype, mask, temperature = case.dtype, case.mask, case.temperature
    exact = oracle(inputs, case)
    results = run_ranks(case.tp, on_a_rank, case, inputs)
    for other in results:
        assert torch.equal(other.loss, results[0].loss) and torch.equal(other.metrics, results[0].metrics)
    loss, metrics, d_hidden, _ = results[0]
    if case.sequence_parallel:
        d_hidden = torch.cat([result.d_hidden for result in results])
    d_weight = torch.cat([result.d_weight for result in results])
    assert d_hidden.dtype == d_weight.dtype == dtype
    assert torch.equal(loss, metrics[METRICS.index("loss")])
    if mask == "none":
        assert not metrics.any() and not d_hidden.any() and not d_weight.any()
        return
    # Sums over tokens; in bfloat16 a logit of 4 is rounded by up to 2^-7, and the top-1 of a near tie may change.
    close = {"rtol": 1e-6, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 2 + 0.1 / min(temperature, 1)}
    torch.testing.assert_close(metrics.double(), exact.metrics, **close)
    assert relative_error(d_hidden, exact.d_hidden) < case.tolerance
    assert relative_error(d_weight, exact.d_weight) < case.tolerance


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"])
def test_metrics_do_not_depend_on_the_layout(dtype, close):
    """In bfloat16 up to logits that are rounded differently, because sums of products have another order."""
    case = Case(dtype=dtype, temperature=0.25)
    alone, *others = (run_ranks(tp, on_a_rank, replace(case, tp=tp, sequence_parallel=sp), make_inputs(case))[0].metrics
                      for tp, sp in LAYOUTS)  # fmt: skip
    for metrics in others:
        torch.testing.assert_close(metrics, alone, rtol=close, atol=1e-6)


def with_and_without(case: Case, inputs: Inputs) -> tuple[Outputs, Outputs]:
    return on_a_rank(case, inputs), on_a_rank(case, inputs, with_teacher=False)


@pytest.mark.parametrize("layout, dtype, chunk", grid(layout=LAYOUTS, dtype=(torch.float32, torch.bfloat16), chunk=(7, 16)))
def test_a_teacher_of_weight_0_changes_no_bit(layout, dtype, chunk):
    case = Case(*layout, dtype, chunk, temperature=0.25, kd_weight=0.0)
    for taught, plain in run_ranks(case.tp, with_and_without, case, make_inputs(case)):
        assert torch.equal(taught.metrics[: len(METRICS)], plain.metrics)
        assert all(torch.equal(taught[i], plain[i]) for i in (0, 2, 3))


def masked_rubbish(case: Case, inputs: Inputs) -> bool:
    clean = on_a_rank(case, inputs)
    masked = inputs.mask == 0
    rubbish = torch.tensor([float("nan"), float("inf")])
    hidden, teacher_hidden, labels = inputs.hidden.clone(), inputs.teacher_hidden.clone(), inputs.labels.clone()
    hidden.flatten(0, 1)[masked] = rubbish.repeat(HIDDEN // 2).to(hidden)
    teacher_hidden.flatten(0, 1)[masked] = rubbish.repeat(TEACHER_HIDDEN // 2).to(hidden)
    labels[masked] = -100
    soiled = on_a_rank(case, inputs._replace(hidden=hidden, teacher_hidden=teacher_hidden, labels=labels))
    return all(torch.equal(a, b) for a, b in zip(clean, soiled, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_masked_tokens_hold_changes_no_bit(dtype):
    case = Case(dtype=dtype, temperature=0.25)
    assert all(run_ranks(2, masked_rubbish, case, make_inputs(case)))


def without_grad(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    hidden, weight = own(case, inputs)
    with_grad = call(case, inputs, hidden, weight)[1]
    with torch.no_grad():
        loss, metrics = call(case, inputs, hidden, weight)
    assert not loss.requires_grad
    return with_grad, metrics


def test_without_grad_the_metrics_are_the_same():
    case = Case(sequence_parallel=True, temperature=4.0)
    for with_grad, metrics in run_ranks(2, without_grad, case, make_inputs(case)):
        assert torch.equal(with_grad, metrics)


def test_a_label_outside_the_vocabulary_gives_nan_and_not_a_wrong_loss():
    case = replace(Case(), mask="all")
    inputs = make_inputs(case)
    inputs.labels[5] = 50
    for result in run_ranks(2, on_a_rank, case, inputs):
        assert result.loss.isnan() and result.d_hidden.isnan().any()
