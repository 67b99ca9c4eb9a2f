"""The output head's kernels in Triton's interpreter, against float64. `test_interpreted.py` runs this file in a process of its own.

Not named test_*: Triton reads TRITON_INTERPRET as a kernel is defined, so these tests need an environment of their own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_salt.model.kernels import INTERPRETED
from megatron_salt.model.kernels import triton_passes as head
from megatron_salt.model.kernels.passes import Blocks, new_logits
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard, compare, judge
from tests.support.virtual_cuda.triton_interpreter import prepare_once_a_kernel

ROWS = 6
COLUMNS = [1, 63, 4096, 5003]
"""One id; less than the alignment of rows; the block of a kernel; a block and a part."""
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
"""Of the student's logits and of the teacher's."""

assert INTERPRETED, "run by tests/model/kernels/test_interpreted.py, with TRITON_INTERPRET=1"
prepare_once_a_kernel()


def in_room(values: Tensor) -> Tensor:
    """The logits in a buffer of the head, whose padding holds NaN."""
    room = new_logits(*values.shape, values.dtype, values.device)
    if room.stride(0) > room.size(1):
        room.as_strided((room.size(0), room.stride(0)), room.stride()).fill_(float("nan"))
    return room.copy_(values)


def logits(columns: int, dtype: torch.dtype, offset: float, seed: int) -> Tensor:
    """[ROWS, columns] of spread 3. The first row rises and the second falls, so that the largest logit comes last, and first."""
    values = 3 * torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))
    values[0], values[1] = values[0].sort().values, values[1].sort(descending=True).values
    values[2, columns // 2 :] = values[2, 0]  # ties
    return (values + offset).to(dtype)


def columns_of_labels(columns: int) -> Tensor:
    """A label column for each row, int64; the last row's label is on another rank."""
    return torch.tensor([0, columns - 1, columns // 2, columns // 3, columns - 1, -1])


def expected(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """float64 [14, ROWS]: the twelve sums with a teacher, the teacher's gap and the student's."""

    def of(values: Tensor) -> tuple[list[Tensor], Tensor]:
        below = values - values.amax(-1, keepdim=True)
        label = torch.where(labels >= 0, values.gather(1, labels.clamp(0)[:, None])[:, 0], -torch.inf)
        return [values.amax(-1), below.exp().sum(-1), label, (below == 0).sum(-1).double()], below

    student_sums, below = of(student.double())
    teacher_sums, teacher_below = of(teacher.double())
    soft = (teacher_below / temperature).exp()
    both = ((below == 0) & (teacher_below == 0)).sum(-1).double()
    soft_sums = [soft.sum(-1), (soft * below).sum(-1), (soft * (teacher_below / temperature - below)).sum(-1), both]
    gaps = [(values.exp() * values).sum(-1) for values in (teacher_below, below)]
    return torch.stack([*student_sums, *teacher_sums, *soft_sums, *gaps])


def assert_near(sums: Tensor, oracle: Tensor) -> None:
    """Within the rounding of a float32 sum over a few thousand terms."""
    torch.testing.assert_close(sums.double(), oracle, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("student_type, teacher_type", TYPES)
@pytest.mark.parametrize("temperature, offset", [(1.0, 0.0), (0.25, 60.0)])
def test_the_sums_are_those_of_float64(
    columns: int, student_type: torch.dtype, teacher_type: torch.dtype, temperature: float, offset: float
) -> None:
    student, teacher = logits(columns, student_type, 0, seed=1), logits(columns, teacher_type, offset, seed=2)
    labels = columns_of_labels(columns)
    oracle = expected(student, teacher, labels, temperature)
    with_teacher, alone, with_gap = torch.empty(12, ROWS), torch.empty(4, ROWS), torch.empty(5, ROWS)
    with_both = torch.empty(13, ROWS)
    head.row_sums(in_room(student), in_room(teacher), labels, temperature, False, with_teacher)
    head.row_sums(in_room(student), in_room(teacher), labels, temperature, True, with_both)
    head.row_sums(in_room(student), None, labels, 1.0, False, alone)
    head.row_sums(in_room(student), None, labels, 1.0, True, with_gap)
    assert_near(with_teacher, oracle[:12])
    assert_near(with_both[12], oracle[12])
    assert_near(with_gap[4], oracle[13])
    assert torch.equal(with_both[:12], with_teacher)  # a gate by the entropy changes no bit of the others
    assert torch.equal(alone, with_teacher[:4])  # a teacher changes no bit of the student's
    assert torch.equal(alone, with_gap[:4])


def test_rows_without_padding_are_read_to_their_end_and_no_further() -> None:
    wide = torch.full((ROWS, 70), float("nan"))
    wide[:, :67] = logits(67, torch.float32, 0, seed=1)
    labels, padded, bare = columns_of_labels(67), torch.empty(4, ROWS), torch.empty(4, ROWS)
    head.row_sums(in_room(wide[:, :67]), None, labels, 1.0, False, padded)
    head.row_sums(wide[:, :67], None, labels, 1.0, False, bare)
    assert torch.equal(padded, bare)


def test_a_rank_of_padding_alone_has_sums_of_zero_and_no_label() -> None:
    sums, count = torch.full((13, ROWS), float("nan")), torch.full((ROWS,), float("nan"))
    empty = torch.empty(ROWS, 0)
    head.row_sums(empty, empty, torch.full((ROWS,), -1), 0.5, True, sums)
    head.count_above(empty, torch.zeros(ROWS), count)
    head.into_gradient(empty, None, torch.full((ROWS,), -1), count, count, None, None, 1.0)
    assert set(sums[[2, 6]].flatten().tolist()) == {-torch.inf} and not sums[[0, 1, 3, 4, 5, 7, 8, 9, 10, 11, 12]].any()
    assert not count.any()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_float64_and_the_label_is_set(columns: int, dtype: torch.dtype) -> None:
    student, teacher = logits(columns, dtype, 0, seed=1), logits(columns, torch.float32, 0, seed=2)
    labels = columns_of_labels(columns)
    at_label, shift, largest, factor = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(3)).unbind()
    shift, largest = shift + student.float().amax(-1), largest + teacher.amax(-1)
    oracle = (student.double() - shift[:, None]).exp() - factor[:, None] * ((teacher.double() - largest[:, None]) / 0.25).exp()
    rows = labels >= 0
    oracle[rows, labels[rows]] = at_label[rows].double()
    gradient = in_room(student)
    head.into_gradient(gradient, in_room(teacher), labels, at_label, shift, largest, factor, 0.25)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]  # the interpreter cuts to bfloat16 where a GPU rounds
    torch.testing.assert_close(gradient.double(), oracle, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_weight_0_changes_no_bit_of_the_gradient(dtype: torch.dtype) -> None:
    student, teacher = logits(5003, dtype, 0, seed=1), logits(5003, torch.float32, 0, seed=2)
    labels, at_label, shift = columns_of_labels(5003), torch.randn(ROWS), student.float().amax(-1) + 1
    alone, taught = in_room(student), in_room(student)
    head.into_gradient(alone, None, labels, at_label, shift, None, None, 1.0)
    head.into_gradient(taught, in_room(teacher), labels, at_label, shift, teacher.amax(-1), torch.zeros(ROWS), 0.25)
    assert torch.equal(alone, taught)


class Alone:
    """A tensor-parallel group of one rank, without torch.distributed."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def shard_of(vocabulary_size: int) -> VocabularyShard:
    return VocabularyShard(Alone(), vocabulary_size, vocabulary_size, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0.0, 60.0])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_equal_models_diverge_by_less_than_a_millionth(offset: float, temperature: float) -> None:
    values = logits(5003, torch.float32, offset, seed=1)
    label_column = shard_of(5003).column_of(torch.zeros(ROWS, dtype=torch.int64))
    _, comparison = compare(
        in_room(values * temperature), in_room(values), temperature, label_column, Alone(), Blocks.of(values)
    )  # type: ignore[arg-type]
    oracle = (values.double() / temperature).log_softmax(-1)
    other = (values * temperature).double().log_softmax(-1)
    torch.testing.assert_close(comparison.kl.double(), (oracle.exp() * (oracle - other)).sum(-1), rtol=1e-5, atol=1e-6)
    _, same = compare(in_room(values), in_room(values), 1.0, label_column, Alone(), Blocks.of(values))  # type: ignore[arg-type]
    assert same.kl.abs().max() < 1e-6


def test_rank_and_entropy_are_those_of_float64() -> None:
    values = logits(5003, torch.float32, 30.0, seed=1)
    labels = columns_of_labels(5003).clamp(0)
    judgement = judge(in_room(values), shard_of(5003).column_of(labels), Alone(), Blocks.of(values))  # type: ignore[arg-type]
    log_p = values.double().log_softmax(-1)
    torch.testing.assert_close(judgement.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(judgement.rank, (values > values.gather(1, labels[:, None])).sum(-1).float())


def head_of(dtype: torch.dtype, weight: float | None) -> SimpleNamespace:
    """Loss, metrics and gradients of the whole head: 30 tokens, 2 of them masked and NaN, in chunks of 16; V = 1000."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, output, teacher_hidden, teacher_output = draw(30, 1, 32), draw(1000, 32), draw(30, 1, 16), draw(1000, 16)
    labels, mask = torch.randint(0, 1000, (30,), generator=generator), torch.ones(30)
    mask[[3, 20]], hidden[3], teacher_hidden[20], labels[20] = 0.0, float("nan"), float("nan"), 10**6
    hidden.requires_grad_(), output.requires_grad_()
    teacher = None if weight is None else SoftTarget(teacher_hidden, teacher_output, 0.25, weight)
    loss, metrics = fused_linear_cross_entropy(hidden, output, labels, mask, shard_of(1000), 16, teacher)
    loss.backward()
    counted = mask > 0
    log_p = (hidden.detach().double()[counted, 0] @ output.detach().double().t()).log_softmax(-1)
    target = torch.nn.functional.one_hot(labels[counted], 1000).double()
    if weight:
        soft = (teacher_hidden.double()[counted, 0] @ teacher_output.double().t() / 0.25).softmax(-1)
        target = (1 - weight) * target + weight * soft
    d_logits = log_p.exp() - target
    d_hidden = torch.zeros(30, 32, dtype=torch.float64)
    d_hidden[counted] = d_logits @ output.detach().double()
    return SimpleNamespace(
        loss=loss.detach(), metrics=metrics, d_hidden=hidden.grad[:, 0], d_output=output.grad,
        oracle=-(target * log_p).sum(), d_hidden_oracle=d_hidden,
        d_output_oracle=d_logits.t() @ hidden.detach().double()[counted, 0],
    )  # fmt: skip


@pytest.mark.parametrize("weight", [None, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gives_the_loss_and_the_gradients_of_float64(dtype: torch.dtype, weight: float | None) -> None:
    head_ = head_of(dtype, weight)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]  # logits and their gradient are rounded to the dtype
    assert abs(head_.loss.double() - head_.oracle) <= bound * abs(head_.oracle)
    for gradient, oracle in ((head_.d_hidden, head_.d_hidden_oracle), (head_.d_output, head_.d_output_oracle)):
        assert (gradient.double() - oracle).norm() <= 4 * bound * oracle.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_weight_0_changes_no_bit_of_the_head(dtype: torch.dtype) -> None:
    alone, taught = head_of(dtype, None), head_of(dtype, 0.0)
    assert torch.equal(alone.loss, taught.loss) and torch.equal(alone.metrics, taught.metrics[:3])
    assert torch.equal(alone.d_hidden, taught.d_hidden) and torch.equal(alone.d_output, taught.d_output)
