"""Reductions of logits over a vocabulary that is split among the ranks of a tensor-parallel group.

Each rank reduces its own ids, block by block, relative to its own largest logit. One all-gather of a few numbers for each token collects
these partial sums, and a pure function combines them. That takes one collective and one pass over the logits; a MAX followed by a SUM
would take two of each. All ranks compute the same bits. The gathered sums are small beside logits. A rank may have only padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.config.teaching import Gate
from megatron_salt.model.kernels.passes import NUM_SOFT_SUMS, NUM_SUMS, Blocks, count_above, row_sums


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

    def column_of(self, labels_n: Tensor) -> Tensor:
        """int64 [n]: the label's column in this rank's logits; -1 where the label is not among this rank's real ids."""
        local = labels_n - self.first
        return torch.where((local >= 0) & (local < self.real_rows), local, -1)


@dataclass(frozen=True, kw_only=True)
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

    label_logit: Tensor
    """The label's logit itself; -inf where no rank has it."""

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


@dataclass(frozen=True, kw_only=True)
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

    inside: Tensor | None
    """bool [n]: whether the gate lets the token through; None without a gate."""


def reduce(logits_nv: Tensor, label_column: Tensor, group: dist.ProcessGroup, blocks: Blocks) -> Softmax:
    """The softmax of logits [n, real ids of this rank], in any float dtype. Collective over the group; every rank receives."""
    return _combine(_Sums(*_gather(row_sums(logits_nv, None, label_column, 1.0, False, blocks), group)))


def judge(logits_nv: Tensor, label_column: Tensor, group: dist.ProcessGroup, blocks: Blocks) -> Judgement:
    """`reduce`, the label's rank and the entropy. Collective over the group; every rank receives.

    Logits must be float32: rounded logits would tie. It needs one more collective than `reduce`: one rank has the label's logit, and
    all ranks have ids above it.
    """
    assert logits_nv.dtype == torch.float32, logits_nv.dtype
    gathered = _gather(row_sums(logits_nv, None, label_column, 1.0, True, blocks), group)
    parts, gaps = _Sums(*gathered[:NUM_SUMS]), gathered[NUM_SUMS]  # gaps: sum_v exp(logit_v - largest) (logit_v - largest)
    softmax = _combine(parts)
    return Judgement(softmax, _label_rank(logits_nv, softmax, group, blocks), _entropy(parts, gaps))


def compare(
    logits_nv: Tensor, teacher_nv: Tensor, temperature: float, label_column: Tensor, group: dist.ProcessGroup, blocks: Blocks,
    gate: Gate | None = None,
) -> tuple[Softmax, Comparison]:  # fmt: skip
    """The student's softmax, bit for bit that of `reduce`, and its comparison with the teacher. Collective over the group; all receive.

    A gate by the rank needs one more collective and one more pass over the teacher's logits, as `judge` does."""
    by_entropy = gate is not None and gate.kind == "entropy"
    packed = _gather(row_sums(logits_nv, teacher_nv, label_column, temperature, by_entropy, blocks), group)
    student, teacher, soft = _unpack(packed[: 2 * NUM_SUMS + NUM_SOFT_SUMS])
    student_whole, comparison = _combine_both(student, teacher, soft, temperature)
    if gate is None:
        return student_whole, comparison
    if gate.kind == "probability":
        inside = comparison.teacher.log_p.exp() >= gate.bound
    elif gate.kind == "rank":
        inside = _label_rank(teacher_nv, comparison.teacher, group, blocks) < gate.bound
    else:
        inside = _entropy(teacher, packed[-1]) <= gate.bound
    return student_whole, replace(comparison, inside=inside)


def _label_rank(logits_nv: Tensor, softmax: Softmax, group: dist.ProcessGroup, blocks: Blocks) -> Tensor:
    """How many ids have a larger logit than the label, float32 [n]. Collective over the group; every rank receives."""
    rank = count_above(logits_nv, softmax.label_logit, blocks)
    if group.size() > 1:
        dist.all_reduce(rank, group=group)
    return rank


def _entropy(parts: _Sums, gaps: Tensor) -> Tensor:
    """-sum_v p_v log p_v, nats [n], from the partial sums of all ranks. gaps [tp, n]: sum_v exp(logit_v - largest) (logit_v - largest)."""
    _, below = _below_group(parts)
    factor = below.exp()
    sum_exp = (factor * parts.sum_exp).sum(0)
    mean_gap = (factor * (gaps + parts.sum_exp * below)).sum(0) / sum_exp
    return sum_exp.log() - mean_gap


class _Sums(NamedTuple):
    """Partial sums of one model's logits on one rank, float32 [n]; gathered: [tp, n]. A rank without ids has sums of 0."""

    largest: Tensor
    sum_exp: Tensor
    """sum_v exp(logit_v - this rank's largest): at least 1 where there is an id."""
    label: Tensor
    """The label's logit; -inf if the label is on another rank."""
    ties: Tensor
    """How many of this rank's ids have its largest logit."""


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


def _unpack(packed: Tensor) -> tuple[_Sums, _Sums, _SoftSums]:
    """The sums of the student, of the teacher, and of both."""
    return _Sums(*packed[:NUM_SUMS]), _Sums(*packed[NUM_SUMS : 2 * NUM_SUMS]), _SoftSums(*packed[2 * NUM_SUMS :])


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
    log_sum = torch.where(label > float("-inf"), log_sum, float("nan"))
    return Softmax(largest=largest, log_sum=log_sum, label=label - largest, ties=ties, label_logit=label)


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
    return student_whole, Comparison(
        teacher=teacher_whole, sum_exp=sum_exp, mean_logit=logit / sum_exp, kl=kl, agreement=agreement, inside=None
    )
