"""The fused loss with a teacher: KL, ties and gradients where rounding is largest, and the tensors that it keeps and makes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import Blocks
from megatron_salt.model.loss import KD_METRICS, METRICS, SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard, compare, reduce
from tests.model.kd_loss.cases import ROWS, TOKENS, Case, make_inputs, on_a_rank
from tests.model.test_loss import Alone, Storages, relative_error
from tests.support.ranks import run_ranks


def of_equal_models(case: Case, tp: int) -> dict[str, float]:
    """The metrics of a student and a teacher that have the same hidden states and weight."""
    inputs = make_inputs(case)
    inputs = inputs._replace(teacher_hidden=inputs.hidden, teacher_weight=inputs.weight)
    return dict(zip(KD_METRICS, run_ranks(tp, on_a_rank, case, inputs)[0].metrics.tolist(), strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_teacher_like_the_student_has_kl_0_and_agrees(tp):
    metrics = of_equal_models(Case(mask="all"), tp)
    assert abs(metrics["kl"]) < 1e-6 * TOKENS
    assert metrics["agreement"] == TOKENS and metrics["teacher_ce"] == metrics["ce"]
    assert metrics["accuracy"] == metrics["teacher_accuracy"]


@pytest.mark.parametrize("tp", [1, 2])
def test_in_bfloat16_equal_models_differ_by_the_rounding_of_the_students_logits_alone(tp):
    """The teacher's are float32. Logits below 8 are rounded by d < 2^-6, and KL is at most d^2 / 2 where logits are off by d or less."""
    metrics = of_equal_models(Case(dtype=torch.bfloat16, mask="all"), tp)
    assert -1e-6 * TOKENS < metrics["kl"] < 2.0**-13 * TOKENS
    assert metrics["teacher_ce"] == pytest.approx(metrics["ce"], abs=2.0**-6 * TOKENS)


def of_an_offset(offset: float, temperature: float) -> tuple[Tensor, Tensor]:
    """(d_hidden, the same in float64) of a head in bfloat16 whose teacher adds `offset` to all its logits, which changes no p."""
    generator = torch.Generator().manual_seed(5)

    def draw(rows: int, width: int, std: float = 1.0) -> Tensor:
        return torch.randn(rows, width, generator=generator) * std

    hidden, weight, teacher_hidden, teacher_weight = draw(64, 64), draw(512, 64, 1 / 8), draw(64, 48), draw(512, 48, 1 / 7)
    teacher_hidden[:, 0], teacher_weight[:, 0] = 1, offset  # numbers of bfloat16: the offset is exact
    tensors = [tensor.bfloat16() for tensor in (hidden, weight, teacher_hidden, teacher_weight)]
    wide_hidden, wide_weight, wide_teacher_hidden, wide_teacher_weight = (tensor.double() for tensor in tensors)
    labels = torch.randint(0, 512, (64,), generator=generator)
    p = (wide_teacher_hidden @ wide_teacher_weight.t() / temperature).softmax(-1)
    target = 0.333 * torch.nn.functional.one_hot(labels, 512) + 0.667 * p
    exact = ((wide_hidden @ wide_weight.t()).softmax(-1) - target) @ wide_weight
    own = tensors[0][:, None].requires_grad_()
    teacher = SoftTarget(tensors[2][:, None], tensors[3], temperature, 0.667)
    shard = VocabularyShard(Alone(), 512, 512, False)
    fused_linear_cross_entropy(own, tensors[1], labels, torch.ones(64), shard, 24, teacher)[0].backward()
    assert own.grad is not None
    return own.grad[:, 0], exact


@pytest.mark.parametrize("form", ["native", "widened"])
@pytest.mark.parametrize("offset", [0.0, 30.0, 60.0])
def test_a_bfloat16_gradient_is_right_wherever_the_teachers_logits_lie(offset, form, monkeypatch):
    """bfloat16 logits would be off by up to 0.125 at 60, and by four times that after the division by T: 14% of the gradient."""
    monkeypatch.setenv(matrix_products.FORM, form)
    assert relative_error(*of_an_offset(offset, temperature=0.25)) < 3e-3


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_kl_of_any_token_is_right_and_never_below_0(temperature, scale, noise):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 5000, generator=generator) * scale
    teacher = (
        logits * temperature + torch.randn(64, 5000, generator=generator) * noise
    )  # p at its temperature is near the student's
    label_column = VocabularyShard(Alone(), 5000, 5000, False).column_of(torch.zeros(64, dtype=torch.int64))
    student, comparison = compare(logits, teacher, temperature, label_column, Alone(), Blocks.of(logits))
    alone = reduce(logits, label_column, Alone(), Blocks.of(logits))
    assert all(torch.equal(a, b) for a, b in zip(vars(student).values(), vars(alone).values(), strict=True))
    log_p, log_q = (teacher.double() / temperature).log_softmax(-1), logits.double().log_softmax(-1)
    assert comparison.kl.min() >= -1e-6
    torch.testing.assert_close(comparison.kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=2e-6, atol=1e-6)


def whole_numbers(tp: int, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[list[list[float]], float]:
    """(student's hits, teacher's hits, agreement) of each row, and the student's accuracy from the fused loss, on a rank of tp."""
    group, rows = dist.group.WORLD, student.size(1) // tp
    assert group is not None
    shard = VocabularyShard(group, rows, student.size(1), False)
    own = slice(shard.first, shard.first + rows)
    parts = student[:, own].contiguous(), teacher[:, own].contiguous()
    softmax, comparison = compare(*parts, 0.25, shard.column_of(labels), group, Blocks.of(parts[0]))
    figures = [softmax.hit.tolist(), comparison.teacher.hit.tolist(), comparison.agreement.tolist()]
    one_hot = torch.eye(student.size(1))  # the weight is the identity, so hidden states are logits
    _, sums = fused_linear_cross_entropy(student[:, None], one_hot[own], labels, torch.ones(len(labels)), shard, 3)
    return figures, float(sums[METRICS.index("accuracy")])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tie_counts_as_its_share(tp):
    """Oracle: a uniform choice, in float64, among the ids with the largest logit. Logits have few values, so ties are frequent."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randint(0, 3, (200, 6), generator=generator).float() for _ in range(2))
    labels = torch.randint(0, 6, (200,), generator=generator)
    student_share, teacher_share = (
        (logits == logits.amax(-1, keepdim=True)).double() / (logits == logits.amax(-1, keepdim=True)).sum(-1, keepdim=True)
        for logits in (student, teacher)
    )
    right = [share.gather(1, labels[:, None])[:, 0] for share in (student_share, teacher_share)] + [
        (student_share * teacher_share).sum(-1)
    ]
    assert {len(set(column.tolist())) > 3 for column in right} == {True}
    for figures, accuracy in run_ranks(tp, whole_numbers, tp, student, teacher, labels):
        torch.testing.assert_close(torch.tensor(figures, dtype=torch.float64), torch.stack(right), rtol=1e-6, atol=0)
        assert accuracy == pytest.approx(float(right[0].sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_teacher_gets_no_gradient_and_is_not_kept_for_backward(dtype):
    case = Case(dtype=dtype)
    inputs = make_inputs(case)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    teacher = SoftTarget(
        inputs.teacher_hidden.clone().requires_grad_(), inputs.teacher_weight.clone().requires_grad_(), 1.0, 0.5
    )
    shard = VocabularyShard(Alone(), ROWS, case.vocabulary_size, False)
    loss, _ = fused_linear_cross_entropy(hidden, weight, inputs.labels, inputs.mask, shard, case.chunk, teacher)
    references = [weakref.ref(teacher.hidden), weakref.ref(teacher.weight)]
    loss.backward(retain_graph=True)
    assert teacher.hidden.grad is None and teacher.weight.grad is None and hidden.grad is not None
    del teacher
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_the_largest_tensor_is_a_chunk_of_logits_however_many_tokens():
    vocabulary_size, chunk = 512, 32
    for num_tokens in (64, 1024):
        hidden, teacher_hidden = torch.randn(num_tokens, 1, 4, requires_grad=True), torch.randn(num_tokens, 1, 6)
        weight, teacher_weight = torch.randn(vocabulary_size, 4, requires_grad=True), torch.randn(vocabulary_size, 6)
        labels, mask = torch.zeros(num_tokens, dtype=torch.int64), torch.ones(num_tokens)
        with Storages((hidden, weight, labels, mask, teacher_hidden, teacher_weight)) as new:
            fused_linear_cross_entropy(
                hidden,
                weight,
                labels,
                mask,
                VocabularyShard(Alone(), vocabulary_size, vocabulary_size, False),
                chunk,
                SoftTarget(teacher_hidden, teacher_weight, 0.5, 0.5),
            )[0].backward()
        assert max(new.sizes) == vocabulary_size * chunk * 4
