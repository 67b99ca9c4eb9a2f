"""The fused loss with a teacher equals full logits in float64: loss, metrics and both gradients, for any sharding."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import Blocks
from megatron_salt.model.loss import KD_METRICS, METRICS, SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard, compare, reduce
from tests.model.test_loss import Alone, Storages, relative_error
from tests.support.grids import grid
from tests.support.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN, TEACHER_HIDDEN, ROWS = 12, 3, 16, 24, 64
TOKENS = SEQUENCE * BATCH


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    chunk: int = 7
    vocabulary_size: int = 50
    mask: str = "weights"
    temperature: float = 1.0
    kd_weight: float = 0.667
    shared_ids: int | None = None
    """Ids that the teacher has; None: all of the student's."""

    @property
    def tolerance(self) -> float:
        """Tolerance of a gradient, see test_loss.py. The teacher's logits are float32; the temperature divides their error."""
        return {torch.float32: 5e-7 * max(1.0, 1 / self.temperature), torch.bfloat16: 8e-3}[self.dtype]


class Inputs(NamedTuple):
    hidden: Tensor  # [s, b, h]
    weight: Tensor  # [ROWS, h], rows from vocabulary_size on hold arbitrary values
    labels: Tensor  # [s*b]
    mask: Tensor  # [s*b]
    teacher_hidden: Tensor  # [s, b, h_t]
    teacher_weight: Tensor  # [ROWS, h_t], arbitrary values in the same rows


class Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, teacher_weight = draw(ROWS, HIDDEN) * 1.5 / HIDDEN**0.5, draw(ROWS, TEACHER_HIDDEN) * 1.5 / TEACHER_HIDDEN**0.5
    labels = torch.randint(0, case.shared_ids or case.vocabulary_size, (TOKENS,), generator=generator)
    uniform = torch.rand(TOKENS, generator=generator)
    mask = {"all": (uniform > -1), "weights": uniform.round(decimals=1) * (uniform > 0.3), "none": (uniform > 1)}[
        case.mask
    ].float()
    weight[case.vocabulary_size :] = teacher_weight[case.vocabulary_size :] = float("nan")
    floats = draw(SEQUENCE, BATCH, HIDDEN), weight, draw(SEQUENCE, BATCH, TEACHER_HIDDEN), teacher_weight
    hidden, weight, teacher_hidden, teacher_weight = (tensor.to(case.dtype) for tensor in floats)
    return Inputs(hidden, weight, labels, mask, teacher_hidden, teacher_weight)


def oracle(inputs: Inputs, case: Case) -> Outputs:
    """Oracle: cross entropy against the mixed target, from full logits in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (inputs.hidden, inputs.weight[: case.vocabulary_size]))
    logits = (hidden @ weight.t()).flatten(0, 1)
    teacher = (inputs.teacher_hidden.double() @ inputs.teacher_weight[: case.vocabulary_size].double().t()).flatten(0, 1)
    if case.shared_ids is not None:
        teacher[:, case.shared_ids :] = -1e6
    log_q, log_p = logits.log_softmax(-1), (teacher / case.temperature).log_softmax(-1)
    label = inputs.labels[:, None]
    ce, teacher_ce = -log_q.gather(1, label)[:, 0], -teacher.log_softmax(-1).gather(1, label)[:, 0]
    target = (1 - case.kd_weight) * torch.zeros_like(log_p).scatter(1, label, 1.0) + case.kd_weight * log_p.exp()
    terms = {
        "tokens": torch.ones_like(ce),
        "loss": -(target * log_q).sum(-1),
        "accuracy": logits.argmax(-1) == inputs.labels,
        "ce": ce,
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_ce": teacher_ce,
        "teacher_accuracy": teacher.argmax(-1) == inputs.labels,
        "agreement": teacher.argmax(-1) == logits.argmax(-1),
    }
    metrics = torch.stack([(terms[name] * inputs.mask.double()).sum() for name in KD_METRICS])
    metrics[METRICS.index("loss")].backward()
    assert hidden.grad is not None and weight.grad is not None
    d_weight = torch.zeros(inputs.weight.shape, dtype=torch.float64)
    d_weight[: case.vocabulary_size] = weight.grad
    return Outputs(metrics[METRICS.index("loss")].detach(), metrics.detach(), hidden.grad, d_weight)


def call(case: Case, inputs: Inputs, hidden: Tensor, weight: Tensor, with_teacher: bool = True) -> tuple[Tensor, Tensor]:
    tp, rank = dist.get_world_size(), dist.get_rank()
    shard = VocabularyShard(dist.group.WORLD, ROWS // tp, case.vocabulary_size, case.sequence_parallel)
    teacher = (
        SoftTarget(
            inputs.teacher_hidden.chunk(tp)[rank].clone(),
            inputs.teacher_weight.chunk(tp)[rank].clone(),
            case.temperature,
            case.kd_weight,
            case.shared_ids,
        )
        if with_teacher
        else None
    )
    before = () if teacher is None else (teacher.hidden.clone(), teacher.weight.clone())
    result = fused_linear_cross_entropy(hidden, weight, inputs.labels, inputs.mask, shard, case.chunk, teacher)
    if teacher is not None:
        for was, now in zip(before, (teacher.hidden, teacher.weight), strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True, msg="the teacher was written to")
    return result


def own(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """This rank's hidden states and weight."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    hidden = inputs.hidden.chunk(tp)[rank] if case.sequence_parallel else inputs.hidden
    return hidden.clone().requires_grad_(), inputs.weight.chunk(tp)[rank].clone().requires_grad_()


def on_a_rank(case: Case, inputs: Inputs, with_teacher: bool = True) -> Outputs:
    hidden, weight = own(case, inputs)
    loss, metrics = call(case, inputs, hidden, weight, with_teacher)
    assert loss._base is None and loss.dtype == metrics.dtype == torch.float32 and not metrics.requires_grad
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Outputs(loss.detach(), metrics, hidden.grad, weight.grad)


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


def compare_with_oracle(case: Case) -> None:
    inputs = make_inputs(case)
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


def test_a_label_outside_the_vocabulary_gives_nan_and_not_a_wrong_loss():
    case = replace(Case(), mask="all")
    inputs = make_inputs(case)
    inputs.labels[5] = 50
    for result in run_ranks(2, on_a_rank, case, inputs):
        assert result.loss.isnan() and result.d_hidden.isnan().any()
