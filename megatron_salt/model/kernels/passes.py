"""Passes over the logits of one rank: fused kernels on a GPU, torch's operations block by block on a CPU.

`kernels_for` alone chooses between the two. The torch forms are the kernels' oracle. On a CPU blocks are small enough that float32
copies stay in cache. Logits are [n, v], float32 or bfloat16; v may be 0, on a rank that has padding alone.
TRITON_INTERPRET=1 in the environment has a CPU run the kernels too, slowly, in Triton's interpreter: for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from megatron_salt.model.kernels import ALIGNMENT, INTERPRETED

NUM_SUMS = 4
"""Sums of one model's logits: the largest; sum of exp(logit - largest); the label's logit; how many logits equal the largest."""
NUM_SOFT_SUMS = 4
"""Sums of both models' logits: see `row_sums`."""
_BLOCK = 1 << 20  # float32 logits in a block: a CPU's cache holds a few such buffers


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module of kernels, or None where torch's own operations do its work."""
    if device.type != "cuda" and not INTERPRETED:
        return None
    from megatron_salt.model.kernels import triton_passes  # here: Triton is installed where there are GPUs

    return triton_passes


def slices(length: int, size: int) -> Iterator[slice]:
    """[0, length) in slices of `size`. The last slice may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def new_logits(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer for logits [rows, columns].

    For kernels each row starts at a multiple of 64 columns: 16-byte loads and cuBLAS's fast products need that, and a vocabulary may
    have any size. Elsewhere the buffer is contiguous.
    """
    stride = -(-num_columns // ALIGNMENT) * ALIGNMENT if kernels_for(device) else num_columns
    return torch.empty((num_rows, stride), dtype=dtype, device=device)[:, :num_columns]


class Blocks:
    """Blocks of rows of a chunk of logits, small enough that float32 copies stay in cache, and the buffers for these copies.

    Buffers are reused. On a CPU a new buffer for each block would cost more than its arithmetic: the allocator takes large pieces from
    the kernel, which maps each page anew. Kernels use neither blocks nor buffers.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        """For chunks of at most `num_rows` rows. A rank without columns has no blocks."""
        self._rows = min(num_rows, max(1, _BLOCK // max(1, num_columns)))
        self._columns, self._device = num_columns, device
        self._buffers: dict[int, Tensor] = {}

    @staticmethod
    def of(logits_nv: Tensor) -> Blocks:
        """Blocks for chunks of this shape."""
        return Blocks(logits_nv.size(0), logits_nv.size(1), logits_nv.device)

    def over(self, logits_nv: Tensor) -> Iterator[slice]:
        """The rows of a chunk, one slice for each block."""
        return slices(logits_nv.size(0), self._rows) if self._columns else iter(())

    def buffer(self, number: int, rows: slice) -> Tensor:
        """Scratch buffer `number`, float32 [rows, columns]. Each number has its own; every block reuses it."""
        if number not in self._buffers:
            self._buffers[number] = torch.empty((self._rows, self._columns), dtype=torch.float32, device=self._device)
        return self._buffers[number][: rows.stop - rows.start]


def row_sums(
    student: Tensor, teacher: Tensor | None, label_column: Tensor, temperature: float, with_gap: bool, blocks: Blocks
) -> Tensor:
    """Sums over each row: float32 [4, n]; with a teacher [12, n]; with_gap one more.

    label_column: int64 [n], the label's column, -1 where the label is on another rank. Rows of the result: the student's largest logit,
    sum_v exp(logit_v - largest), label's logit (-inf on another rank), number of logits that equal the largest. With a teacher then the
    teacher's four, and with e_v = exp((teacher logit_v - largest) / temperature): sum_v e_v; sum_v e_v (student logit_v - student's
    largest); sum_v e_v ((teacher logit_v - largest) / temperature - (student logit_v - student's largest)); number of columns where both
    have their largest. The last of these but one has differences as its terms: a difference of two sums would lose the small divergence
    of models that agree.
    with_gap: then sum_v exp(logit_v - largest) (logit_v - largest), of the teacher where there is one, else of the student.
    Every other sum is the same, bit for bit, in every form that has it. Without columns the sums are 0.
    """
    rows = NUM_SUMS if teacher is None else 2 * NUM_SUMS + NUM_SOFT_SUMS
    sums = torch.zeros((rows + with_gap, student.size(0)), dtype=torch.float32, device=student.device)
    if kernels := kernels_for(student.device):
        kernels.row_sums(student, teacher, label_column, temperature, with_gap, sums)
        return sums
    _add_label(sums[2], student, label_column)
    if teacher is not None:
        _add_label(sums[NUM_SUMS + 2], teacher, label_column)
    for part in blocks.over(student):
        if teacher is not None:
            _block_with_teacher(sums[:, part], student[part], teacher[part], temperature, blocks, part)
            continue
        below = _below_largest(sums[:, part], student[part], blocks.buffer(0, part), blocks.buffer(1, part))
        if not with_gap:
            sums[1, part] = below.exp_().sum(-1)
        else:
            exp = torch.exp(below, out=blocks.buffer(1, part))
            sums[1, part] = exp.sum(-1)
            sums[4, part] = torch.linalg.vecdot(exp, below)
    return sums


def _block_with_teacher(
    sums: Tensor, student: Tensor, teacher: Tensor, temperature: float, blocks: Blocks, part: slice
) -> None:
    """`row_sums` of one block with a teacher."""
    student_below = _below_largest(sums, student, blocks.buffer(0, part), blocks.buffer(2, part))
    teacher_below = _below_largest(sums[NUM_SUMS:], teacher, blocks.buffer(1, part), blocks.buffer(2, part))
    soft_sums, gap = sums[2 * NUM_SUMS : 2 * NUM_SUMS + NUM_SOFT_SUMS], sums[2 * NUM_SUMS + NUM_SOFT_SUMS :]
    exp = torch.add(student_below, teacher_below, out=blocks.buffer(2, part))
    soft_sums[3] = torch.eq(exp, 0, out=exp).sum(-1)  # neither is above 0
    exp = torch.exp(teacher_below, out=exp)
    sums[NUM_SUMS + 1] = exp.sum(-1)
    if len(gap):
        gap[0] = torch.linalg.vecdot(exp, teacher_below)
    if temperature != 1:
        exp = torch.exp(teacher_below.div_(temperature), out=exp)
    soft_sums[0] = exp.sum(-1)
    soft_sums[1] = torch.linalg.vecdot(exp, student_below)
    soft_sums[2] = torch.linalg.vecdot(exp, teacher_below.sub_(student_below))
    sums[1] = student_below.exp_().sum(-1)


def _add_label(out: Tensor, logits: Tensor, label_column: Tensor) -> None:
    out.fill_(float("-inf"))
    if logits.size(1):
        out.copy_(torch.where(label_column >= 0, logits.gather(1, label_column.clamp(min=0)[:, None])[:, 0], float("-inf")))


def _below_largest(sums: Tensor, logits: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """A block minus its largest logits, in `out`. Sets these and their number. Overwrites `scratch`."""
    sums[0] = logits.amax(-1)
    below = torch.sub(logits, sums[0][:, None], out=out)
    sums[3] = torch.eq(below, 0, out=scratch).sum(-1)  # exact below 2^24 ids; six times faster than a sum of bool
    return below


def count_above(logits: Tensor, threshold: Tensor, blocks: Blocks) -> Tensor:
    """How many logits of each row are above its threshold (float32 [n]): float32 [n], exact below 2^24 ids."""
    count = torch.zeros_like(threshold)
    if kernels := kernels_for(logits.device):
        kernels.count_above(logits, threshold, count)
        return count
    for part in blocks.over(logits):
        count[part] = torch.gt(logits[part], threshold[part, None], out=blocks.buffer(0, part)).sum(-1)
    return count


def into_gradient(
    student: Tensor, teacher: Tensor | None, label_column: Tensor, at_label: Tensor, shift: Tensor, teacher_largest: Tensor | None,
    teacher_factor: Tensor | None, temperature: float, blocks: Blocks,
) -> Tensor:  # fmt: skip
    """exp(student - shift) - teacher_factor exp((teacher - teacher_largest) / temperature), and `at_label` at the label; over `student`.

    label_column: int64 [n], -1 where the label is on another rank. at_label, shift and, with a teacher, the others: float32 [n].
    """
    if not student.size(1):
        return student
    if kernels := kernels_for(student.device):
        kernels.into_gradient(student, teacher, label_column, at_label, shift, teacher_largest, teacher_factor, temperature)
        return student
    in_place = student.dtype == torch.float32
    for part in blocks.over(student):
        block = torch.sub(student[part], shift[part, None], out=student[part] if in_place else blocks.buffer(0, part)).exp_()
        if teacher is not None and teacher_largest is not None and teacher_factor is not None:
            below = torch.sub(teacher[part], teacher_largest[part, None], out=blocks.buffer(1, part))
            block.addcmul_(below.div_(temperature).exp_(), teacher_factor[part, None], value=-1)
        if not in_place:
            student[part] = block
    at = (torch.arange(student.size(0), device=student.device), label_column.clamp(min=0))
    # Not scatter_: on a CPU in bfloat16 it makes a float32 copy of the whole chunk.
    return student.index_put_(at, torch.where(label_column >= 0, at_label.to(student.dtype), student[at]))
