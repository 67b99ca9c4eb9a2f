"""The teacher's output weight on the student's last stage: loaded as a whole, then cut to the ids that both models have.

The check of the teacher's recorded losses needs all its rows, so they come first, cut evenly over the student's tensor-parallel ranks. In
training the teacher's distribution is renormalised over the shared ids. The probability that it loses by that is measured, and bounded by
--teacher-max-dropped-mass. Of an imported teacher whose texts had a BOS, the loss on the same samples is measured with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_salt.checkpoint import sharded_state
from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import new_logits, slices
from megatron_salt.model.loss import METRICS, fused_linear_cross_entropy, gather_sequence
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.collectives import first_problem
from megatron_salt.parallel.device import current_device
from megatron_salt.salt.teacher import Teacher, TeacherHead
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint

WINDOWS = 16
"""Samples of the run on which the dropped probability, and the loss with BOS, are measured."""


def head_with_all_ids(head: TeacherHead, vocabulary_size: int) -> TeacherHead:
    """The head for a teacher of `vocabulary_size` ids as it was saved: `head` itself where student and teacher have the same ids, else with
    the teacher's rows cut evenly over the ranks. Pure."""
    if head.shard.vocabulary_size == vocabulary_size == head.shared_ids:
        return head
    rows = -(-vocabulary_size // head.shard.group.size())
    return replace(head, shard=replace(head.shard, rows=rows, vocabulary_size=vocabulary_size), shared_ids=vocabulary_size)


def load_output_weight(checkpoint: TeacherCheckpoint, head: TeacherHead, dtype: torch.dtype) -> Tensor | None:
    """The teacher's output weight [rows, h_t] as `head.shard` cuts it, on ranks of the student's last stage; None elsewhere.

    Rows that only one of the two paddings has are zeros or left out. Collective over all ranks; read once and spread over dp x cp.
    """
    student, weight, state = head.student, None, {}
    if student.is_last_stage:
        untied = checkpoint.model.untie_embeddings_and_output_weights
        weight = torch.zeros(head.shard.rows, checkpoint.model.hidden_size, dtype=dtype, device=current_device())
        state["weight"] = ShardedTensor.from_rank_offsets(
            "output_layer.weight" if untied else "embedding.word_embeddings.weight", weight, (0, student.at.tp, student.layout.tensor),
            replica_id=dist.get_rank(student.groups.dp_cp), allow_shape_mismatch=True,
        )  # fmt: skip
    loaded = sharded_state.load(state, checkpoint.directory, student.groups)
    return loaded["weight"] if student.is_last_stage else None


def cut_rows(weight: Tensor, whole: VocabularyShard, shard: VocabularyShard, shared_ids: int) -> Tensor:
    """Rows [0, shared_ids) of a weight that lies as `whole` says, as `shard` says: [shard.rows, h], other rows 0.

    Collective over the tensor-parallel group, which both have in common. Each rank sends and receives rows in order, so nothing is copied
    but into the result.
    """
    ranks = range(whole.group.size())
    own, rank = torch.zeros(shard.rows, weight.size(1), dtype=weight.dtype, device=weight.device), whole.group.rank()

    def common(sender: int, receiver: int) -> int:
        first = max(sender * whole.rows, receiver * shard.rows)
        end = min((sender + 1) * whole.rows, (receiver + 1) * shard.rows, shared_ids)
        return max(0, end - first)

    send, receive = [common(rank, other) for other in ranks], [common(other, rank) for other in ranks]
    dist.all_to_all_single(own[: sum(receive)], weight[: sum(send)], receive, send, group=whole.group)
    return own


@dataclass(frozen=True)
class DroppedMass:
    """Probability that the teacher gives to ids which the student does not share with it, on samples of the run."""

    mean: float
    """Mean over tokens: the largest of those at --kd-teacher-temperature, or the ends of its schedule, and at 1."""
    windows: int
    """Samples on which it was measured."""
    shared_ids: int
    all_ids: int
    """Ids of the teacher's own softmax."""
    max_mass: float
    """--teacher-max-dropped-mass. mean is at most this."""

    def __str__(self) -> str:
        return (
            f"teacher: {self.all_ids - self.shared_ids} of its {self.all_ids} ids are not the student's; on {self.windows} windows of the "
            f"run it gives them {self.mean:.2e} of its probability (--teacher-max-dropped-mass {self.max_mass:g})"
        )


def refuse_dropped_mass(
    teacher: Teacher, max_mass: float, windows: Sequence[Microbatch], head: TeacherHead, shared_ids: int,
    temperatures: Sequence[float], look: Look = stay,
) -> DroppedMass:  # fmt: skip
    """The mean probability that the teacher gives to ids from `shared_ids` on. Raises UserError, on every rank, where it is above max_mass
    or NaN. Collective over all ranks; all get the same result. The teacher must still have its whole output weight, which `head` cuts.

    windows: one sample a microbatch, the same on every rank; the replicas of a block share them. temperatures: the largest of the means
    counts. look: called before each forward.
    """
    sums = torch.zeros(
        1 + len(temperatures), dtype=torch.float64, device=current_device()
    )  # tokens; dropped at each temperature
    positions = head.own_positions()
    for start in range(0, len(windows), teacher.replicas):
        look("measuring what the teacher gives to ids that the student lacks")
        some = windows[start : start + teacher.replicas]
        for window, hidden in zip(some, teacher.hidden_states(some, merge=1), strict=True):
            if hidden is not None and teacher.weight is not None:
                mask = window.loss_mask[0, positions].to(current_device())
                passed = (hidden, teacher.weight, mask, head.shard, shared_ids, head.chunk_tokens)
                dropped = [dropped_mass(*passed, temperature) for temperature in temperatures]
                sums += torch.stack([mask.sum(dtype=torch.float64), *dropped])
    dist.all_reduce(sums, group=teacher.block_group)  # every tp rank of the last stage has the same: the ratio does not change
    mean = sums[1:].max() / sums[0].clamp(min=1)  # NaN stays NaN
    value = float(mean)
    problem = None
    if not value <= max_mass:  # not (a <= b) also rejects NaN
        problem = (
            f"the teacher gives {value:.3g} of its probability to ids that the student does not share (on {len(windows)} windows of the "
            f"run's data; ids from {shared_ids} to {head.shard.vocabulary_size - 1}), more than --teacher-max-dropped-mass "
            f"{max_mass:g}; make the data with the teacher's own tokenizer, or raise the limit"
        )
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)  # blocks differ in rounding
    return DroppedMass(float(mean), len(windows), shared_ids, head.shard.vocabulary_size, max_mass)


@torch.no_grad()
def dropped_mass(
    hidden: Tensor, weight: Tensor, mask: Tensor, shard: VocabularyShard, shared_ids: int, chunk_tokens: int, temperature: float
) -> Tensor:
    """sum over tokens that count of sum_{v >= shared_ids} softmax(logits / temperature)_v, a float64 scalar. Collective over the
    tensor-parallel group; all its ranks receive.

    hidden: [s, b, h], with sequence parallelism [s/tp, b, h]. weight: [rows, h], as `shard` cuts it. mask: float32 [s*b]; a token with 0
    does not count.
    """
    hidden_nh = (gather_sequence(hidden, shard.group) if shard.sequence_parallel else hidden).flatten(0, 1)
    assert hidden_nh.size(0) == mask.numel(), (hidden_nh.shape, mask.shape)
    kept, chunk_tokens = max(0, min(shared_ids - shard.first, shard.real_rows)), min(chunk_tokens, mask.numel())
    buffer = new_logits(chunk_tokens, shard.real_rows, torch.float32, weight.device)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for chunk in slices(mask.numel(), chunk_tokens):
        counts = mask[chunk] > 0
        scaled_nv = matrix_products.logits(hidden_nh[chunk], weight[: shard.real_rows], buffer[: counts.numel()]).div_(
            temperature
        )
        largest = torch.full((counts.numel(),), float("-inf"), device=weight.device)
        if shard.real_rows:
            largest = scaled_nv.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
        exp_nv = scaled_nv.sub_(largest[:, None]).exp_()
        sums = torch.stack([exp_nv.sum(-1, dtype=torch.float64), exp_nv[:, kept:].sum(-1, dtype=torch.float64)])
        dist.all_reduce(sums, group=shard.group)
        total += torch.where(counts, sums[1] / sums[0], 0).sum()
    return total


# ---- with and without BOS ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BosLosses:
    """Loss of a teacher on samples of the run as they are, and with BOS in place of the first token of each."""

    without: float
    """Mean cross entropy over the tokens that count, nats a token, over all of the teacher's own ids."""
    beginning: float
    """The same with BOS. The labels are the same ones."""
    bos: int
    windows: int

    def __str__(self) -> str:
        return (
            f"teacher: its tokenizer begins a text with BOS (id {self.bos}), and the data has none; on {self.windows} windows of the "
            f"run its loss is {self.without:.4f} as the data is, and {self.beginning:.4f} with BOS in place of the first token of each"
        )


@torch.no_grad()
def losses_with_bos(
    teacher: Teacher, bos: int, windows: Sequence[Microbatch], head: TeacherHead, look: Look = stay
) -> BosLosses:
    """The teacher's loss without and with BOS. Collective over all ranks; all get the same result. The teacher must still have its whole
    output weight, which `head` cuts.

    windows: one sample a microbatch, the same on every rank; the replicas of a block share them. look: called before each forward.
    """
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64, device=current_device())
    positions = head.own_positions()
    for number, variant in enumerate((windows, [begun_with(bos, window) for window in windows])):
        for start in range(0, len(variant), teacher.replicas):
            look("measuring the teacher's loss with and without BOS")
            some = variant[start : start + teacher.replicas]
            for window, hidden in zip(some, teacher.hidden_states(some, merge=1), strict=True):
                if hidden is not None and teacher.weight is not None:
                    labels = window.labels[0, positions].to(current_device())
                    mask = window.loss_mask[0, positions].to(current_device())
                    sums[number] += fused_linear_cross_entropy(
                        hidden, teacher.weight, labels, mask, head.shard, head.chunk_tokens
                    )[1]
    dist.all_reduce(sums, group=teacher.block_group)  # every tp rank of the last stage has the same: the ratio does not change
    losses = sums[:, METRICS.index("loss")] / sums[:, METRICS.index("tokens")].clamp(min=1)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)  # blocks differ in rounding
    without, beginning = losses.tolist()
    return BosLosses(without, beginning, bos, len(windows))


def begun_with(bos: int, window: Microbatch) -> Microbatch:
    """The samples with BOS in place of the first token of each; labels, mask, positions and documents stay."""
    tokens = window.tokens.clone()
    tokens[:, 0] = bos
    return replace(window, tokens=tokens)
