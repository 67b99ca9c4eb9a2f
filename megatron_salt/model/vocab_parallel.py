"""Reductions of logits over a vocabulary that is split among the ranks of a tensor-parallel group.

Each rank reduces its own ids, block by block, relative to its own largest logit. One all-gather of a few numbers for each token collects
these partial sums, and a pure function combines them. That takes one collective and one pass over the logits; a MAX followed by a SUM
would take two of each. All ranks compute the same bits. The gathered sums are small beside logits. A rank may have only padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # float32 logits in a block: a CPU's cache; enough to hide a GPU's kernel launches


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the padded vocabulary that this rank's weight holds, and whether the group splits the sequence."""

    group: dist.ProcessGroup
    """The tensor-parallel group. Its rank r holds rows [r * rows, (r+1) * rows)."""

    rows: int
    """Rows of the weight on each rank, padding included."""

    vocabulary_size: int
    """Real ids in the whole vocabulary. The rows above are padding, which takes no part in the loss and in no product."""

    sequence_parallel: bool
    """Whether each rank has only its slice of the sequence."""

    @property
    def first(self) -> int:
        """This rank's first id."""
        return self.group.rank() * self.rows

    @property
    def real_rows(self) -> int:
        """Number of this rank's real ids; 0 if it holds only padding."""
        return max(0, min(self.vocabulary_size - self.first, self.rows))


@dataclass(frozen=True)
class Label:
    """The labels of a chunk, as row numbers of this rank."""

    is_local: Tensor
    """bool [n]: whether the label is among this rank's real ids."""

    index: Tensor
    """int64 [n, 1]: the row of the label on this rank; any valid row if the label is on another rank."""

    @staticmethod
    def of(labels_n: Tensor, shard: VocabularyShard) -> Label:
        local = labels_n - shard.first
        is_local = (local >= 0) & (local < shard.real_rows)
        return Label(is_local, torch.where(is_local, local, 0)[:, None])


@dataclass(frozen=True)
class Softmax:
    """The distribution of a model over the whole vocabulary, at temperature 1; float32 [n] each."""

    largest: Tensor
    """The largest logit."""

    log_sum: Tensor
    """log sum_v exp(logit_v - largest); NaN where no rank has the label."""

    label: Tensor
    """The label's logit minus the largest; -inf where no rank has it."""

    ties: Tensor
    """How many ids have the largest logit: at least 1."""

    @property
    def log_p(self) -> Tensor:
        """Log-probability of the label. Not label logit minus log-sum-exp, which would cancel where p is near 1."""
        return self.label - self.log_sum

    @property
    def hit(self) -> Tensor:
        """The chance that the top-1 id is the label: 1 if only the label has the largest logit, 1/n if n ids tie, else 0."""
        return torch.where(self.label == 0, 1 / self.ties, 0)


@dataclass(frozen=True)
class Judgement:
    """Rank of the label and entropy of a distribution; float32 [n] each."""

    softmax: Softmax
    rank: Tensor
    """How many ids have a larger logit than the label."""
    entropy: Tensor
    """-sum_v p_v log p_v, nats."""


@dataclass(frozen=True)
class Comparison:
    """A teacher's p = softmax(teacher logits / T) compared with a student's softmax at T = 1; float32 [n] each."""

    teacher: Softmax
    """The teacher's own distribution, at T = 1."""

    sum_exp: Tensor
    """sum_v exp((teacher logit_v - largest) / T)."""

    mean_logit: Tensor
    """sum_v p_v (student logit_v - student's largest)."""

    kl: Tensor
    """sum_v p_v (log p_v - log of the student's probability)."""

    agreement: Tensor
    """The chance that both models choose the same id, if each draws among the ids with its largest logit. 1: both have the same single
    id. 0: they share none."""


def slices(length: int, size: int) -> Iterator[slice]:
    """[0, length) in slices of `size`. The last slice may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Blocks:
    """Blocks of rows of a chunk of logits, small enough that float32 copies stay in cache, and the buffers for these copies.

    Buffers are reused. On a CPU a new buffer for each block would cost more than its arithmetic: the allocator takes large pieces from
    the kernel, which maps each page anew.
    """

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        """For chunks of at most `num_rows` rows. A rank without columns has no blocks."""
        self._rows = min(num_rows, max(1, _BLOCK[device.type] // max(1, num_columns)))
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


def reduce(logits_nv: Tensor, label: Label, group: dist.ProcessGroup, blocks: Blocks) -> Softmax:
    """The softmax of logits [n, real ids of this rank], in any float dtype. Collective over the group; every rank receives."""
    packed = logits_nv.new_zeros((_NUM_SUMS, logits_nv.size(0)), dtype=torch.float32)
    part = _Sums(*packed)
    part.add_label(logits_nv, label)
    for rows in blocks.over(logits_nv):
        part.sum_exp[rows] = part.below_largest(logits_nv, rows, blocks.buffer(0, rows), blocks.buffer(1, rows)).exp_().sum(-1)
    return _combine(_Sums(*_gather(packed, group)))


def judge(logits_nv: Tensor, label: Label, group: dist.ProcessGroup, blocks: Blocks) -> Judgement:
    """`reduce`, the label's rank and the entropy. Collective over the group; every rank receives.

    Logits must be float32: rounded logits would tie. It needs one more collective than `reduce`: one rank has the label's logit, and
    all ranks have ids above it.
    """
    assert logits_nv.dtype == torch.float32, logits_nv.dtype
    packed = logits_nv.new_zeros((_NUM_SUMS + 1, logits_nv.size(0)))
    part, gap = _Sums(*packed[:_NUM_SUMS]), packed[_NUM_SUMS]  # gap: sum_v exp(logit_v - largest) (logit_v - largest)
    part.add_label(logits_nv, label)
    for rows in blocks.over(logits_nv):
        block = part.below_largest(logits_nv, rows, blocks.buffer(0, rows), blocks.buffer(1, rows))
        exp_bv = torch.exp(block, out=blocks.buffer(1, rows))
        part.sum_exp[rows] = exp_bv.sum(-1)
        gap[rows] = torch.linalg.vecdot(exp_bv, block)
    gathered = _gather(packed, group)
    parts, gaps = _Sums(*gathered[:_NUM_SUMS]), gathered[_NUM_SUMS]
    softmax = _combine(parts)
    label_logit = parts.label.amax(0)
    rank = logits_nv.new_zeros(logits_nv.size(0))
    for rows in blocks.over(logits_nv):
        above_bv = torch.gt(logits_nv[rows], label_logit[rows, None], out=blocks.buffer(0, rows))
        rank[rows] = above_bv.sum(-1)  # exact below 2^24 ids
    if group.size() > 1:
        dist.all_reduce(rank, group=group)
    _, below = _below_group(parts)
    factor = below.exp()
    sum_exp = (factor * parts.sum_exp).sum(0)
    mean_gap = (factor * (gaps + parts.sum_exp * below)).sum(0) / sum_exp
    return Judgement(softmax, rank, sum_exp.log() - mean_gap)


def compare(
    logits_nv: Tensor, teacher_nv: Tensor, temperature: float, label: Label, group: dist.ProcessGroup, blocks: Blocks
) -> tuple[Softmax, Comparison]:
    """The student's softmax, bit for bit that of `reduce`, and its comparison with the teacher. Collective over the group; all receive."""
    packed = logits_nv.new_zeros((2 * _NUM_SUMS + _NUM_SOFT_SUMS, logits_nv.size(0)), dtype=torch.float32)
    student, teacher, soft = _unpack(packed)
    student.add_label(logits_nv, label)
    teacher.add_label(teacher_nv, label)
    for rows in blocks.over(logits_nv):
        student_bv = student.below_largest(logits_nv, rows, blocks.buffer(0, rows), blocks.buffer(2, rows))
        teacher_bv = teacher.below_largest(teacher_nv, rows, blocks.buffer(1, rows), blocks.buffer(2, rows))
        exp_bv = torch.add(student_bv, teacher_bv, out=blocks.buffer(2, rows))
        soft.both[rows] = torch.eq(exp_bv, 0, out=exp_bv).sum(-1)  # neither is above 0
        exp_bv = torch.exp(teacher_bv, out=exp_bv)
        teacher.sum_exp[rows] = exp_bv.sum(-1)
        if temperature != 1:
            exp_bv = torch.exp(teacher_bv.div_(temperature), out=exp_bv)
        soft.sum_exp[rows] = exp_bv.sum(-1)
        soft.logit[rows] = torch.linalg.vecdot(exp_bv, student_bv)
        soft.gap[rows] = torch.linalg.vecdot(exp_bv, teacher_bv.sub_(student_bv))
        student.sum_exp[rows] = student_bv.exp_().sum(-1)
    return _combine_both(*_unpack(_gather(packed, group)), temperature)


class _Sums(NamedTuple):
    """Partial sums of one model's logits on one rank, float32 [n]; gathered: [tp, n]. A rank without ids has sums of 0."""

    largest: Tensor
    sum_exp: Tensor
    """sum_v exp(logit_v - this rank's largest): at least 1 where there is an id."""
    label: Tensor
    """The label's logit; -inf if the label is on another rank."""
    ties: Tensor
    """How many of this rank's ids have its largest logit."""

    def add_label(self, logits_nv: Tensor, label: Label) -> None:
        self.label.fill_(float("-inf"))
        if logits_nv.size(1):
            self.label.copy_(torch.where(label.is_local, logits_nv.gather(1, label.index)[:, 0], float("-inf")))

    def below_largest(self, logits_nv: Tensor, rows: slice, out: Tensor, scratch: Tensor) -> Tensor:
        """A block of rows minus its largest logits, in `out`. Also sets `largest` and `ties`. Overwrites `scratch`."""
        self.largest[rows] = logits_nv[rows].amax(-1)
        block = torch.sub(logits_nv[rows], self.largest[rows, None], out=out)
        self.ties[rows] = torch.eq(block, 0, out=scratch).sum(-1)  # exact below 2^24 ids; six times faster than a sum of bool
        return block


class _SoftSums(NamedTuple):
    """Partial sums of both models' logits on one rank, float32 [n]; gathered: [tp, n]. e_v = exp((teacher logit_v - largest) / T)."""

    sum_exp: Tensor
    """sum_v e_v"""
    logit: Tensor
    """sum_v e_v (student logit_v - student's largest)"""
    gap: Tensor
    """sum_v e_v ((teacher logit_v - largest) / T - (student logit_v - student's largest)). The terms are differences, because a
    difference of two sums would lose the small KL divergence of models that agree."""
    both: Tensor
    """How many of this rank's ids have its largest logit in both models."""


_NUM_SUMS, _NUM_SOFT_SUMS = len(_Sums._fields), len(_SoftSums._fields)


def _unpack(packed: Tensor) -> tuple[_Sums, _Sums, _SoftSums]:
    """The sums of the student, of the teacher, and of both."""
    return _Sums(*packed[:_NUM_SUMS]), _Sums(*packed[_NUM_SUMS : 2 * _NUM_SUMS]), _SoftSums(*packed[2 * _NUM_SUMS :])


def _gather(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [sums, n] of every rank: [sums, tp, n]."""
    if group.size() == 1:
        return packed[:, None]
    parts = packed.new_empty((group.size() * packed.size(0), packed.size(1)))
    dist.all_gather_into_tensor(parts, packed, group=group)
    return parts.view(group.size(), *packed.shape).transpose(0, 1)


def _combine(parts: _Sums) -> Softmax:
    """Combine the partial sums [tp, n] of all ranks."""
    largest, below = _below_group(parts)
    label = parts.label.amax(0)
    log_sum = (parts.sum_exp * below.exp()).sum(0).log()
    ties = torch.where((parts.sum_exp > 0) & (below == 0), parts.ties, 0).sum(0)
    return Softmax(largest, torch.where(label > float("-inf"), log_sum, float("nan")), label - largest, ties)


def _below_group(parts: _Sums) -> tuple[Tensor, Tensor]:
    """The group's largest logit [n], and each rank's largest minus it [tp, n]. The latter is 0 for a rank without ids, whose sums are 0."""
    largest = torch.where(parts.sum_exp > 0, parts.largest, float("-inf")).amax(0)
    return largest, torch.where(parts.sum_exp > 0, parts.largest - largest, 0)


def _combine_both(student: _Sums, teacher: _Sums, soft: _SoftSums, temperature: float) -> tuple[Softmax, Comparison]:
    """Combine the partial sums [tp, n] of all ranks, which are relative to each rank's own largest logits."""
    student_whole, teacher_whole = _combine(student), _combine(teacher)
    _, student_below = _below_group(student)
    _, teacher_below = _below_group(teacher)
    teacher_below = teacher_below / temperature
    factor = teacher_below.exp()
    sum_exp = (factor * soft.sum_exp).sum(0)
    logit = (factor * (soft.logit + soft.sum_exp * student_below)).sum(0)
    gap = (factor * (soft.gap + soft.sum_exp * (teacher_below - student_below))).sum(0)
    kl = gap / sum_exp + (student_whole.log_sum.exp() / sum_exp).log()  # the ratio is near 1 if the models agree
    both = torch.where((student_below == 0) & (teacher_below == 0), soft.both, 0).sum(0)
    agreement = both / (student_whole.ties * teacher_whole.ties)
    return student_whole, Comparison(teacher_whole, sum_exp, logit / sum_exp, kl, agreement)
