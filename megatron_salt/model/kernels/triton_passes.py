"""The passes of passes.py as Triton kernels.

`row_sums` reads the logits of one model, or of two, once, and `into_gradient` writes the gradient over the student's logits. torch reads
and writes float32 copies of every block instead: ten times the memory traffic. The torch forms are the oracle, and what a CPU runs.

Law: a form with a teacher computes the student's sums and gradient with the very operations, block size and warps of the form without
one, so that a teacher of weight 0 changes no bit. Hence no autotuning and no contraction of products and sums.

Where rows have room for it, loads are masked by the number of real ids rounded up to `ALIGNMENT`, so that the compiler can use 16-byte
loads; what lies behind the real ids is read and replaced, and may hold NaN. Row offsets are int64.
TRITON_INTERPRET=1, set before this module is imported, runs the kernels on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_salt.model.kernels import ALIGNMENT, INTERPRETED

BLOCK = 4096
"""Logits of a row at a time. One program works on one row in `row_sums`, on one block of a row in `into_gradient`."""
WARPS = 8
_OPTIONS = {} if INTERPRETED else {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit
def _load(pointer, column, num_columns, readable, below):
    """float32 logits of a block of a row; `below` where there is no real id."""
    logit = tl.load(pointer + column, mask=column < readable, other=0.0).to(tl.float32)
    return tl.where(column < num_columns, logit, below)


@triton.jit
def row_sums_kernel(
    student, teacher, label_column, sums, num_columns, readable, student_stride, teacher_stride, num_rows, inverse_temperature,
    HAS_TEACHER: tl.constexpr, TEMPERED: tl.constexpr, WITH_GAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: `sums` [.., num_rows] in the order of `passes.row_sums`."""
    row = tl.program_id(0)
    student += row.to(tl.int64) * student_stride
    largest, sum_exp, ties, own_gap = -float("inf"), 0.0, 0.0, 0.0
    if HAS_TEACHER:
        teacher += row.to(tl.int64) * teacher_stride
        teacher_largest, teacher_sum, teacher_ties = -float("inf"), 0.0, 0.0
        soft_sum, logit, gap, both, teacher_gap = 0.0, 0.0, 0.0, 0.0, 0.0
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < num_columns
        value = _load(student, column, num_columns, readable, -float("inf"))
        new = tl.maximum(largest, tl.max(value, 0))
        step = tl.where(sum_exp > 0, largest - new, 0.0)  # 0 in the first block, where -inf minus -inf would be NaN
        decay = tl.exp(step)
        below = value - new
        exp = tl.exp(below)
        is_largest = below == 0
        if WITH_GAP and not HAS_TEACHER:
            own_gap = decay * (own_gap + sum_exp * step) + tl.sum(tl.where(real, exp * below, 0.0), 0)
        sum_exp = sum_exp * decay + tl.sum(exp, 0)
        ties = tl.where(step == 0, ties, 0.0) + tl.sum(is_largest.to(tl.float32), 0)
        largest = new
        if HAS_TEACHER:
            value = _load(teacher, column, num_columns, readable, -float("inf"))
            new = tl.maximum(teacher_largest, tl.max(value, 0))
            teacher_step = tl.where(teacher_sum > 0, teacher_largest - new, 0.0)
            teacher_below = value - new
            exp = tl.exp(teacher_below)
            if WITH_GAP:
                teacher_gap = tl.exp(teacher_step) * (teacher_gap + teacher_sum * teacher_step)
                teacher_gap += tl.sum(tl.where(real, exp * teacher_below, 0.0), 0)
            teacher_sum = teacher_sum * tl.exp(teacher_step) + tl.sum(exp, 0)
            teacher_is_largest = teacher_below == 0
            same = tl.where(teacher_step == 0, 1.0, 0.0)
            teacher_ties = same * teacher_ties + tl.sum(teacher_is_largest.to(tl.float32), 0)
            both = tl.where(step == 0, same * both, 0.0) + tl.sum((is_largest & teacher_is_largest).to(tl.float32), 0)
            teacher_largest = new
            soft_step = teacher_step
            if TEMPERED:
                soft_step = teacher_step * inverse_temperature
                teacher_below = teacher_below * inverse_temperature
                exp = tl.exp(teacher_below)
            decay = tl.exp(soft_step)
            logit = decay * (logit + soft_sum * step) + tl.sum(tl.where(real, exp * below, 0.0), 0)
            gap = decay * (gap + soft_sum * (soft_step - step)) + tl.sum(tl.where(real, exp * (teacher_below - below), 0.0), 0)
            soft_sum = soft_sum * decay + tl.sum(exp, 0)
    sums += row
    label = tl.load(label_column + row)
    here = label >= 0
    tl.store(sums, largest)
    tl.store(sums + num_rows, sum_exp)
    tl.store(sums + 2 * num_rows, tl.load(student + label, mask=here, other=-float("inf")).to(tl.float32))
    tl.store(sums + 3 * num_rows, ties)
    if WITH_GAP and not HAS_TEACHER:
        tl.store(sums + 4 * num_rows, own_gap)
    if HAS_TEACHER:
        tl.store(sums + 4 * num_rows, teacher_largest)
        tl.store(sums + 5 * num_rows, teacher_sum)
        tl.store(sums + 6 * num_rows, tl.load(teacher + label, mask=here, other=-float("inf")).to(tl.float32))
        tl.store(sums + 7 * num_rows, teacher_ties)
        tl.store(sums + 8 * num_rows, soft_sum)
        tl.store(sums + 9 * num_rows, logit)
        tl.store(sums + 10 * num_rows, gap)
        tl.store(sums + 11 * num_rows, both)
        if WITH_GAP:
            tl.store(sums + 12 * num_rows, teacher_gap)


@triton.jit
def count_above_kernel(logits, threshold, count, num_columns, readable, stride, BLOCK: tl.constexpr):
    """One row: how many logits are above its threshold."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    least = tl.load(threshold + row)
    above = 0.0
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        above += tl.sum((_load(logits, column, num_columns, readable, -float("inf")) > least).to(tl.float32), 0)
    tl.store(count + row, above)


@triton.jit
def into_gradient_kernel(
    student, teacher, label_column, at_label, shift, teacher_largest, teacher_factor, num_columns, readable, student_stride,
    teacher_stride, inverse_temperature, HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student += row.to(tl.int64) * student_stride
    gradient = tl.exp(_load(student, column, num_columns, readable, 0.0) - tl.load(shift + row))
    if HAS_TEACHER:
        teacher += row.to(tl.int64) * teacher_stride
        below = _load(teacher, column, num_columns, readable, 0.0) - tl.load(teacher_largest + row)
        gradient = gradient - tl.load(teacher_factor + row) * tl.exp(below * inverse_temperature)
    gradient = tl.where(column == tl.load(label_column + row), tl.load(at_label + row), gradient)
    tl.store(student + column, gradient.to(student.dtype.element_ty), mask=column < readable)


@torch.library.custom_op("megatron_salt::row_sums", mutates_args=("sums",))
def row_sums(
    student: Tensor, teacher: Tensor | None, label_column: Tensor, temperature: float, with_gap: bool, sums: Tensor
) -> None:
    """`passes.row_sums`, into `sums`.

    student [n, v], teacher [n, v] or None: float32 or bfloat16, columns contiguous. sums: float32 [4 + with_gap, n], with a teacher
    [12 + with_gap, n], contiguous.
    """
    assert teacher is None or teacher.shape == student.shape
    rows, columns = student.shape
    if not columns:  # a rank of padding alone: sums of 0, and no label
        sums.zero_()
        sums[2] = -torch.inf
        if teacher is not None:
            sums[6] = -torch.inf
        return
    both = (student,) if teacher is None else (student, teacher)
    other = student if teacher is None else teacher
    row_sums_kernel[(rows,)](
        student, other, label_column, sums, columns, _readable(*both), student.stride(0), other.stride(0), rows, 1 / temperature,
        HAS_TEACHER=teacher is not None, TEMPERED=temperature != 1, WITH_GAP=with_gap, BLOCK=BLOCK, **_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("megatron_salt::count_above", mutates_args=("count",))
def count_above(logits: Tensor, threshold: Tensor, count: Tensor) -> None:
    """`passes.count_above`, into `count`."""
    rows, columns = logits.shape
    if not columns:
        count.zero_()
        return
    count_above_kernel[(rows,)](logits, threshold, count, columns, _readable(logits), logits.stride(0), BLOCK=BLOCK, **_OPTIONS)


@torch.library.custom_op("megatron_salt::into_gradient", mutates_args=("student",))
def into_gradient(
    student: Tensor, teacher: Tensor | None, label_column: Tensor, at_label: Tensor, shift: Tensor, teacher_largest: Tensor | None,
    teacher_factor: Tensor | None, temperature: float,
) -> None:  # fmt: skip
    """`passes.into_gradient`. student, teacher: [n, v] as in `row_sums`."""
    rows, columns = student.shape
    if not columns:
        return
    both = (student,) if teacher is None else (student, teacher)
    other = student if teacher is None else teacher
    into_gradient_kernel[(rows, triton.cdiv(columns, BLOCK))](
        student, other, label_column, at_label, shift, shift if teacher_largest is None else teacher_largest,
        shift if teacher_factor is None else teacher_factor, columns, _readable(*both), student.stride(0), other.stride(0),
        1 / temperature, HAS_TEACHER=teacher is not None, BLOCK=BLOCK, **_OPTIONS,
    )  # fmt: skip


def _readable(*logits: Tensor) -> int:
    """Columns that may be read and written in each row: the real ids, rounded up where every row has room for that."""
    columns = logits[0].size(1)
    padded = -(-columns // ALIGNMENT) * ALIGNMENT
    return padded if all(matrix.stride(0) % ALIGNMENT == 0 and matrix.stride(0) >= padded for matrix in logits) else columns
