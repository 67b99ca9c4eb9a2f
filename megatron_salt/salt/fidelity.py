"""Whether a teacher may compute in FP8: by how far that takes its predictions from its own in bfloat16.

Both passes run from the same weights, by the path of a training step, on every replica, on the same fixed batch: first without FP8,
then with it. What they hand out are hidden states, and both share the output weight, which is never in FP8. The measure is the mean
over tokens of KL(bfloat16 teacher || FP8 teacher); above --teacher-fp8-max-kl the run ends before it begins.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu as cpu  # before megatron

from megatron_salt.data.fixed_batch import fixed_batch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.model.attention import positions_of
from megatron_salt.model.divergence import divergence
from megatron_salt.model.fp8 import in_bfloat16
from megatron_salt.model.vocabulary import VocabularyShard
from megatron_salt.parallel.agreement import first_problem
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.salt.teacher import Fidelity, Teacher

SAMPLES = 4
"""Sequences of the batch, each of the run's --seq-length."""


def refuse_unfaithful(
    teacher: Teacher, max_kl: float, vocabulary: int, student: Mesh, shard: VocabularyShard, seq_length: int, chunk_tokens: int,
    look: Look = stay,
) -> Fidelity:  # fmt: skip
    """How near the teacher in FP8 is to itself in bfloat16. Raises UserError, on every rank, where a replica's mean divergence is
    above max_kl (nats a token) or not a number. Collective over all ranks; all get the same. Changes nothing.

    vocabulary: ids of the tokenizer. shard: how the student's output weight, and so the teacher's, is cut. The teacher's body still
    has its bfloat16 weights. look: called before each forward.
    """
    sums = _divergences(teacher, vocabulary, student, shard, seq_length, chunk_tokens, look)
    tokens, kl, agreement = sums.unbind(-1)
    kl, agreement = kl / tokens, agreement / tokens
    worst = next((value for value in kl.tolist() if not value <= max_kl), None)  # so phrased, nan is wrong
    problem = first_problem(None if worst is None else f"{worst:.3g} nats a token")
    if problem is not None:
        raise UserError("the teacher in FP8 is too far from itself in bfloat16: their mean KL divergence on "
                        f"{SAMPLES} fixed samples of {seq_length} tokens was {problem}, above --teacher-fp8-max-kl {max_kl:g}; "
                        "take another --teacher-fp8-recipe, or no --teacher-fp8-format")
    extremes = torch.stack([kl.max(), -agreement.min()])  # of this block's replicas; the worst block's for all
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return Fidelity(kl=float(extremes[0]), agreement=-float(extremes[1]), tokens=SAMPLES * seq_length, max_kl=max_kl)


@torch.no_grad()
def _divergences(
    teacher: Teacher, vocabulary: int, student: Mesh, shard: VocabularyShard, seq_length: int, chunk_tokens: int, look: Look
) -> Tensor:
    """float64 [replicas of the block, 3]: tokens, and the sums over them of the divergence and the agreement, of each of the block's
    teachers; tokens are counted once a tp rank of the student, like the sums. Collective over all ranks; all of a block receive."""
    batch = fixed_batch(vocabulary, seq_length, [seq_length] * SAMPLES)

    def passes() -> list[list[Tensor | None]]:
        hidden = []
        for sample in batch:
            look("checking the teacher in FP8")
            hidden.append(teacher.hidden_states([sample] * teacher.replicas, merge=1))
        return hidden

    assert teacher.body is not None, "the teacher has been freed"
    with in_bfloat16(teacher.body):
        in_bf16 = passes()
    in_fp8 = passes()
    sums = torch.zeros(teacher.replicas, 3, dtype=torch.float64, device=cpu.device())
    gathering = VocabularyShard(shard.group, shard.rows, shard.num_valid, sequence_parallel=True)  # hidden states come in slices
    here = positions_of(seq_length, student.layout.context, student.at.cp, torch.device("cpu"))
    counts = torch.ones(len(here), device=cpu.device())
    for of_sample_bf16, of_sample_fp8 in zip(in_bf16, in_fp8, strict=True):
        for replica, (reference, other) in enumerate(zip(of_sample_bf16, of_sample_fp8, strict=True)):
            if reference is not None and other is not None and teacher.weight is not None:
                kl, agreement = divergence(reference, other, teacher.weight, counts, gathering, chunk_tokens)
                sums[replica] += torch.stack([counts.sum(dtype=torch.float64), kl, agreement])
    dist.all_reduce(sums, group=teacher.block_group)
    return sums
