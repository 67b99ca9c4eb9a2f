"""The fused loss with a gate: exact inside and outside of it, the plain loss bit for bit outside, and bounds as they are meant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_salt.config.teaching import Gate
from megatron_salt.model.kernels.passes import Blocks
from megatron_salt.model.loss import GATED_METRICS, KD_METRICS, METRICS
from megatron_salt.model.token_scores import TokenScorer
from megatron_salt.model.vocab_parallel import VocabularyShard, compare
from tests.model.kd_loss.cases import ROWS, TOKENS, Case, Inputs, make_inputs, on_a_rank, oracle
from tests.model.kd_loss.test_against_float64 import compare_with_oracle
from tests.model.test_loss import Alone
from tests.support.ranks import run_ranks

GATES = [Gate("probability", 0.01), Gate("rank", 16), Gate("entropy", 3.0)]
BF16 = torch.bfloat16
ALL = {"probability": 1e-30, "rank": 10**6, "entropy": 1e6}
"""Bounds with which every token is inside, by kind."""
NONE = {"probability": 2.0, "rank": 0, "entropy": -1.0}
"""Bounds with which none is."""


def name(value: object) -> str | None:
    return f"{value.kind}" if isinstance(value, Gate) else None


def share(case: Case) -> float:
    """The share of tokens inside the gate, by the oracle."""
    sums = dict(zip(GATED_METRICS, oracle(make_inputs(case), case).metrics.tolist(), strict=True))
    return sums["taught"] / sums["tokens"]


@pytest.mark.parametrize("gate", GATES, ids=name)
@pytest.mark.parametrize(
    "tp, sequence_parallel, dtype, chunk, vocabulary_size, temperature, shared_ids",
    [
        (1, False, torch.float32, 7, 50, 0.25, None),
        (1, False, BF16, 1000, 50, 0.25, None),
        (2, True, torch.float32, 7, 50, 4.0, None),
        (2, False, torch.float32, 1000, 30, 0.25, None),  # the second rank has padding alone
        (2, True, torch.float32, 7, 50, 1.0, 20),  # and here none of the teacher's ids
        pytest.param(4, True, BF16, 7, 50, 0.25, 45, marks=pytest.mark.long),
        pytest.param(4, False, torch.float32, 7, 64, 0.25, 20, marks=pytest.mark.long),
    ],
)
def test_loss_metrics_and_gradients_equal_full_logits(
    gate: Gate, tp: int, sequence_parallel: bool, dtype: torch.dtype, chunk: int, vocabulary_size: int, temperature: float,
    shared_ids: int | None,
) -> None:  # fmt: skip
    """The gate asks the teacher at temperature 1, whatever the temperature of its soft labels."""
    case = Case(tp, sequence_parallel, dtype, chunk, vocabulary_size, temperature=temperature, shared_ids=shared_ids)
    case = replace(case, gate=replace(gate, bound=2.5) if gate.kind == "entropy" and shared_ids == 20 else gate)
    assert 0.1 < share(case) < 0.9
    compare_with_oracle(case)


def with_other_labels(case: Case) -> Inputs:
    """Every third label is an id that the teacher lacks."""
    inputs = make_inputs(case)
    labels = inputs.labels.clone()
    labels[::3] = torch.arange(len(labels[::3])) % (case.vocabulary_size - case.shared_ids) + case.shared_ids
    return inputs._replace(labels=labels)


@pytest.mark.parametrize("gate", GATES[:2], ids=name)
def test_a_label_that_the_teacher_lacks_is_outside(gate: Gate) -> None:
    """Its probability is 0, and all shared ids are likelier. The gate by the entropy does not look at labels."""
    bound = {"probability": ALL["probability"], "rank": 20}[gate.kind]
    case = Case(2, False, mask="all", shared_ids=20, gate=replace(gate, bound=bound))
    inputs = with_other_labels(case)
    for outputs in run_ranks(2, on_a_rank, case, inputs):
        assert outputs.metrics[GATED_METRICS.index("taught")] == TOKENS - len(inputs.labels[::3])


def three_ways(case: Case, inputs: Inputs) -> list[tuple[Tensor, ...]]:
    """Loss, gradients and metrics without a gate, with one that lets all through, with one that lets none, and without a teacher."""
    assert case.gate is not None
    kind = case.gate.kind
    gates = (None, Gate(kind, ALL[kind]), Gate(kind, NONE[kind]))
    found = [on_a_rank(replace(case, gate=gate), inputs) for gate in gates] + [on_a_rank(case, inputs, with_teacher=False)]
    return [(one.loss, one.d_hidden, one.d_weight, one.metrics) for one in found]


@pytest.mark.parametrize("gate", GATES, ids=name)
@pytest.mark.parametrize("tp, dtype", [(1, torch.float32), (1, BF16), (2, BF16)])
def test_a_gate_that_is_open_or_shut_changes_no_bit(gate: Gate, tp: int, dtype: torch.dtype) -> None:
    """Open: the loss with a teacher of this weight everywhere. Shut: the loss without one."""
    case = Case(tp, False, dtype, temperature=0.25, gate=gate)
    for ungated, opened, shut, plain in run_ranks(tp, three_ways, case, make_inputs(case)):
        assert all(torch.equal(*pair) for pair in zip(ungated[:3], opened[:3], strict=True))
        assert all(torch.equal(*pair) for pair in zip(plain[:3], shut[:3], strict=True))
        assert torch.equal(opened[3][: len(KD_METRICS)], ungated[3]) and torch.equal(shut[3][: len(METRICS)], plain[3])
        assert torch.equal(opened[3][-1], ungated[3][0]) and shut[3][-1] == 0
        assert torch.equal(opened[3][len(METRICS) : -1], shut[3][len(METRICS) : -1])  # of all tokens


def test_the_figures_are_those_of_the_scores() -> None:
    """Rank and entropy bit for bit what `TokenScorer` gives for the same logits: the gate's bound at a score, and just beside it."""
    case = Case(mask="all")
    inputs = make_inputs(case)
    hidden, weight = inputs.teacher_hidden.flatten(0, 1), inputs.teacher_weight
    shard = VocabularyShard(Alone(), ROWS, case.vocabulary_size, False)
    scorer = TokenScorer(weight, shard, TOKENS)
    scores = scorer.score(hidden[:, None], inputs.labels, inputs.mask)
    teacher = scorer.logits(hidden).clone()
    student, column = torch.randn_like(teacher), shard.column_of(inputs.labels)

    def inside(gate: Gate) -> Tensor:
        _, comparison = compare(student, teacher, 0.25, column, Alone(), Blocks.of(teacher), gate)
        assert comparison.inside is not None
        return comparison.inside

    for rank in sorted(set(scores.rank.tolist()))[:5]:
        assert torch.equal(inside(Gate("rank", rank)), scores.rank < rank)
        assert torch.equal(inside(Gate("rank", rank + 1)), scores.rank <= rank)
    for entropy in scores.entropy.tolist()[:5]:
        assert torch.equal(inside(Gate("entropy", entropy)), scores.entropy <= entropy)
    for p in (-scores.loss).exp().tolist()[:5]:
        assert torch.equal(inside(Gate("probability", p)), (-scores.loss).exp() >= p)


def test_tied_logits_do_not_count_against_the_label() -> None:
    """Oracle: by hand. Ids 1 and 2 tie below id 0."""
    teacher, labels = torch.tensor([[2.0, 1.0, 1.0, 0.0]] * 4), torch.arange(4)
    column = VocabularyShard(Alone(), 4, 4, False).column_of(labels)
    for bound, expected in [(1, [True, False, False, False]), (2, [True, True, True, False]), (4, [True] * 4)]:
        _, comparison = compare(teacher.clone(), teacher, 1.0, column, Alone(), Blocks.of(teacher), Gate("rank", bound))
        assert comparison.inside is not None and comparison.inside.tolist() == expected
