"""Whether a teacher without an output layer hands out hidden states that can guide a layer.

The losses in its checkpoint cannot be computed without that layer. Its files have been compared with their checksums.
"""

from __future__ import annotations

import logging

import torch

from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.parallel.collectives import first_problem
from megatron_salt.salt.teacher import Teacher
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint

log = logging.getLogger(__name__)


def refuse_empty_hidden_states(teacher: Teacher, checkpoint: TeacherCheckpoint, seq_length: int, look: Look = stay) -> None:
    """Raise UserError, on every rank, where a token of the fixed batch has a last hidden state that is zero or not finite: it has no
    direction. Runs each replica of the teacher as a training step does. Collective over all ranks."""
    look("checking the teacher")
    assert teacher.guided is not None
    [microbatch] = fixed_batch(checkpoint.vocabulary_size, seq_length, [seq_length])
    stages = frozenset({teacher.guided.place.stage})
    hidden = teacher.hidden_states([microbatch] * teacher.replicas, merge=1, stages=stages)
    norms = [one.float().norm(dim=-1) for one in hidden if one is not None]
    bad = sum(int((~(torch.isfinite(norm) & (norm > 0))).sum()) for norm in norms)
    problem = first_problem(
        f"the teacher in --teacher-load {checkpoint.directory} gives no direction to {bad} tokens of the fixed batch: their last "
        "hidden states are zero or not finite"
        if bad
        else None
    )
    if problem is not None:
        raise UserError(problem)
    log.info(
        "teacher %s: its last hidden states on the fixed batch are finite; its recorded losses are not computed, because --guide hidden "
        "loads no output layer",
        checkpoint.directory,
    )
