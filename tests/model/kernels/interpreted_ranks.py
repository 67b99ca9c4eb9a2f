"""The output head's kernels on two ranks that split the vocabulary, in Triton's interpreter, against float64.

`test_interpreted.py` runs this file in a process of its own, with TRITON_INTERPRET=1. Its ranks inherit that.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.config.teaching import Gate
from megatron_salt.model.kernels import INTERPRETED
from megatron_salt.model.kernels.passes import Blocks, new_logits
from megatron_salt.model.loss import GATED_METRICS, KD_METRICS, METRICS, SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard, judge
from tests.model.kd_loss.cases import inside_gate
from tests.support.ranks import run_ranks
from tests.support.virtual_cuda.triton_interpreter import prepare_once_a_kernel

TOKENS, HIDDEN, TEACHER_HIDDEN, CHUNK = 12, 16, 24, 5
MASKED = {3: "hidden states", 7: "the teacher's", 10: "label"}
"""Tokens of mask 0, and which of their inputs nobody may look at."""
NOWHERE = 10**6
"""An id outside of every vocabulary."""

assert INTERPRETED, "run by tests/model/kernels/test_interpreted.py, with TRITON_INTERPRET=1"
prepare_once_a_kernel()


@dataclass(frozen=True)
class Case:
    """Rows of the weight on each of two ranks, and real ids. None of the vocabularies is a multiple of anything."""

    rows: int
    vocabulary_size: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    kd_weight: float | None = 0.5
    """None: no teacher."""
    gate: Gate | None = None
    shared_ids: int | None = None

    @property
    def bound(self) -> float:
        """Of a gradient's error over its norm: float32 sums, or roundings of logits and of their gradient to the dtype."""
        return {torch.float32: 2e-6, torch.bfloat16: 2**-6}[self.dtype] * max(1.0, 0.5 / self.temperature)


CASES = {
    "a block and a part, on each rank": Case(2560, 5003),
    "the same, T 0.25": Case(2560, 5003, temperature=0.25),
    "one rank has padding alone": Case(640, 601),
    "one rank has padding alone, T 0.25, bfloat16": Case(640, 601, torch.bfloat16, temperature=0.25),
    "one rank has one id": Case(640, 641, temperature=0.25, kd_weight=1.0),
    "teacher alone, bfloat16": Case(640, 1003, torch.bfloat16, kd_weight=1.0),
    "gate by the probability": Case(640, 1003, temperature=0.25, gate=Gate("probability", 3e-4)),
    "gate by the rank": Case(2560, 5003, temperature=0.25, gate=Gate("rank", 2000)),
    "gate by the rank, one rank has none of the shared ids": Case(
        640, 1003, temperature=0.25, gate=Gate("rank", 250), shared_ids=600
    ),
    "gate by the entropy": Case(2560, 5003, temperature=0.25, gate=Gate("entropy", 7.8)),
    "gate by the entropy, one rank has padding alone, bfloat16": Case(640, 601, torch.bfloat16, gate=Gate("entropy", 5.8)),
    "no teacher": Case(640, 1003, kd_weight=None),
    "no teacher, padding alone, bfloat16": Case(640, 601, torch.bfloat16, kd_weight=None),
}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    """[n, 1, h]"""
    weight: Tensor
    """[2 rows, h]; NaN from the vocabulary's end on."""
    labels: Tensor
    mask: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def make_inputs(case: Case) -> Inputs:
    """Masked tokens hold NaN, or a label outside the vocabulary. The first token's largest logits tie, on both ranks if both have ids."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, teacher_hidden = draw(TOKENS, 1, HIDDEN), draw(TOKENS, 1, TEACHER_HIDDEN)
    weight, teacher_weight = draw(2 * case.rows, HIDDEN) / 4, draw(2 * case.rows, TEACHER_HIDDEN) / 4
    tied = [2, case.vocabulary_size - 1]
    hidden[0], teacher_hidden[0] = hidden[0].sign(), teacher_hidden[0].sign()  # exact sums, in whatever order a rank multiplies
    weight[tied], teacher_weight[tied] = hidden[0, 0] / 2, teacher_hidden[0, 0] / 2
    weight[case.vocabulary_size :] = teacher_weight[case.vocabulary_size :] = float("nan")
    labels, mask = torch.randint(0, case.shared_ids or case.vocabulary_size, (TOKENS,), generator=generator), torch.ones(TOKENS)
    labels[0], labels[1], mask[5] = tied[0] if case.shared_ids else tied[1], 0, 0.3
    mask[list(MASKED)] = 0.0
    hidden[3], teacher_hidden[7], labels[10] = float("nan"), float("nan"), NOWHERE
    floats = (tensor.to(case.dtype) for tensor in (hidden, weight, teacher_hidden, teacher_weight))
    hidden, weight, teacher_hidden, teacher_weight = floats
    return Inputs(hidden, weight, labels, mask, teacher_hidden, teacher_weight)


@dataclass(frozen=True)
class Outputs:
    """The whole head's; from a rank, `d_weight` of its rows."""

    metrics: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def oracle(case: Case, inputs: Inputs) -> Outputs:
    """From full logits in float64, without the masked tokens."""
    counted, size = inputs.mask > 0, case.vocabulary_size
    hidden = inputs.hidden[counted, 0].double().requires_grad_()
    weight = inputs.weight[:size].double().requires_grad_()
    labels, mask = inputs.labels[counted, None], inputs.mask[counted].double()
    logits = hidden @ weight.t()
    teacher = inputs.teacher_hidden[counted, 0].double() @ inputs.teacher_weight[:size].double().t()
    if case.shared_ids is not None:
        teacher[:, case.shared_ids :] = -1e6
    log_q, log_p = logits.log_softmax(-1), (teacher / case.temperature).log_softmax(-1)
    inside = inside_gate(case.gate, teacher, inputs.labels[counted])
    w = torch.where(inside, case.kd_weight or 0.0, 0.0)[:, None]
    target = (1 - w) * torch.zeros_like(log_p).scatter(1, labels, 1.0) + w * log_p.exp()
    chosen, teacher_chosen = (values == values.amax(-1, keepdim=True) for values in (logits.float(), teacher.float()))
    terms = {
        "tokens": torch.ones_like(mask),
        "loss": -(target * log_q).sum(-1),
        "accuracy": chosen.gather(1, labels)[:, 0] / chosen.sum(-1),
        "ce": -log_q.gather(1, labels)[:, 0],
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_ce": -teacher.log_softmax(-1).gather(1, labels)[:, 0],
        "teacher_accuracy": teacher_chosen.gather(1, labels)[:, 0] / teacher_chosen.sum(-1),
        "agreement": (chosen & teacher_chosen).sum(-1) / (chosen.sum(-1) * teacher_chosen.sum(-1)),
        "taught": inside,
    }
    names = METRICS if case.kd_weight is None else KD_METRICS if case.gate is None else GATED_METRICS
    assert case.gate is None or 0 < inside.sum() < counted.sum(), inside
    metrics = torch.stack([(terms[name] * mask).sum() for name in names])
    metrics[METRICS.index("loss")].backward()
    d_hidden = torch.zeros(TOKENS, 1, HIDDEN, dtype=torch.float64)
    d_weight = torch.zeros(2 * case.rows, HIDDEN, dtype=torch.float64)
    d_hidden[counted, 0], d_weight[:size] = hidden.grad, weight.grad  # type: ignore[assignment]
    return Outputs(metrics.detach(), d_hidden, d_weight)


def on_a_rank(case: Case, inputs: Inputs) -> Outputs:
    """The head with this rank's rows, and half of the teacher's sequence."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert INTERPRETED and group is not None
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.chunk(2)[rank].clone().requires_grad_()
    teacher = None
    if case.kd_weight is not None:
        parts = (tensor.chunk(2)[rank].clone() for tensor in (inputs.teacher_hidden, inputs.teacher_weight))
        teacher = SoftTarget(*parts, case.temperature, case.kd_weight, case.shared_ids, case.gate)
    shard = VocabularyShard(group, case.rows, case.vocabulary_size, False)
    loss, metrics = fused_linear_cross_entropy(hidden, weight, inputs.labels, inputs.mask, shard, CHUNK, teacher)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Outputs(metrics, hidden.grad, weight.grad)


def of_two_ranks(case: Case) -> Outputs:
    """What both ranks make together, after checking that they agree where they must."""
    first, second = run_ranks(2, on_a_rank, case, make_inputs(case))
    assert torch.equal(first.metrics, second.metrics) and torch.equal(first.d_hidden, second.d_hidden)
    return Outputs(first.metrics, first.d_hidden, torch.cat((first.d_weight, second.d_weight)))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    assert ours.isfinite().all()
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_ranks_give_the_loss_and_the_gradients_of_float64(case: Case) -> None:
    exact, ours = oracle(case, make_inputs(case)), of_two_ranks(case)
    torch.testing.assert_close(ours.metrics.double(), exact.metrics, rtol=case.bound, atol=2e-5)
    assert relative_error(ours.d_hidden, exact.d_hidden) < case.bound
    assert relative_error(ours.d_weight, exact.d_weight) < case.bound
    assert not ours.d_hidden[list(MASKED)].any() and not ours.d_weight[case.vocabulary_size :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_two_ranks_a_teacher_of_weight_0_changes_no_bit(dtype: torch.dtype) -> None:
    alone = of_two_ranks(Case(640, 1003, dtype, kd_weight=None))
    taught = of_two_ranks(Case(640, 1003, dtype, temperature=0.25, kd_weight=0.0))
    assert torch.equal(alone.metrics, taught.metrics[: len(METRICS)])
    assert torch.equal(alone.d_hidden, taught.d_hidden) and torch.equal(alone.d_weight, taught.d_weight)


@pytest.mark.parametrize("gate", [Gate("probability", 2.0), Gate("rank", 0), Gate("entropy", -1.0)], ids=lambda gate: gate.kind)
def test_on_two_ranks_a_gate_that_lets_no_token_through_changes_no_bit(gate: Gate) -> None:
    alone = of_two_ranks(Case(640, 1003, torch.bfloat16, kd_weight=None))
    taught = of_two_ranks(Case(640, 1003, torch.bfloat16, temperature=0.25, gate=gate))
    assert torch.equal(alone.metrics, taught.metrics[: len(METRICS)]) and not taught.metrics[-1]
    assert torch.equal(alone.d_hidden, taught.d_hidden) and torch.equal(alone.d_weight, taught.d_weight)


def test_a_label_that_counts_and_is_nowhere_gives_nan() -> None:
    case = Case(640, 601)
    inputs = make_inputs(case)
    inputs.labels[2] = NOWHERE
    assert all(outputs.metrics[METRICS.index("loss")].isnan() for outputs in run_ranks(2, on_a_rank, case, inputs))


def judged(logits_nv: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, rank and entropy from this rank's columns of the logits."""
    group = dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(group, rows, logits_nv.size(1), False)
    own = logits_nv[:, shard.first : shard.first + shard.real_rows]
    buffer = new_logits(*own.shape, own.dtype, own.device).copy_(own)
    judgement = judge(buffer, shard.column_of(labels), group, Blocks.of(buffer))
    return judgement.softmax.log_p, judgement.rank, judgement.entropy


@pytest.mark.parametrize("rows", [640, 1024], ids=["both have ids", "one has padding alone"])
def test_two_ranks_judge_as_float64_does(rows: int) -> None:
    logits = 3 * torch.randn(6, 1003, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1002, 639, 640, 500, 700])
    log_p = logits.double().log_softmax(-1)
    for ours, rank, entropy in run_ranks(2, judged, logits, labels, rows):
        torch.testing.assert_close(ours.double(), log_p.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(rank, (logits > logits.gather(1, labels[:, None])).sum(-1).float())
