"""From a teacher's checkpoint to a `Teacher`: build it, load its weights, and verify them.

What files tell comes before ranks join: `teacher_checkpoint.py`, `shared_vocabulary.py`. Then:
1. Build the body on the teacher's own groups, and load it. Load the output weight straight to the student's last stage.
2. Run the teacher in the way of a training step, over all its own ids. It must reproduce the losses that its checkpoint recorded.
3. Cut the output weight to the ids that both models have, where they differ (`output_weight.py`).
4. In FP8 its predictions must stay near those in bfloat16 (`fp8_check.py`).
A teacher that only guides a layer has no output weight here: its hidden states are looked at instead (`guidance/hidden_states_check.py`).
Everything that does not fit is a UserError that names both sides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint import loading, rng, sharded_state
from megatron_salt.checkpoint.run_state import OpenedCheckpoint
from megatron_salt.config import SaltConfig
from megatron_salt.config.teaching import parse_gate
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.model.fp8_teacher import in_bfloat16, keep_fp8_alone, raw_tensors
from megatron_salt.model.gpt import GPT, transformer_config
from megatron_salt.model.loss import METRICS, fused_linear_cross_entropy
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.parallel.collectives import first_problem
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh, make_teacher_mesh, new_group_of, warm_up
from megatron_salt.salt.fp8_check import Fidelity, refuse_unfaithful
from megatron_salt.salt.guidance.hidden_states_check import refuse_empty_hidden_states
from megatron_salt.salt.guidance.layer_place import GuidedLayer
from megatron_salt.salt.output_weight import (
    BosLosses,
    DroppedMass,
    cut_rows,
    head_with_all_ids,
    load_output_weight,
    losses_with_bos,
    refuse_dropped_mass,
)
from megatron_salt.salt.routing import teacher_layout
from megatron_salt.salt.schedule import checked_temperatures, lowest_temperature
from megatron_salt.salt.teacher import Teacher, TeacherHead
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, teacher_parallel

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-3}
"""Largest relative difference between a loss and the recorded one; the coarser of both precisions counts. Small models differ by 1e-6
between layouts in float32, and by 3e-4 where either side is bfloat16."""


@dataclass(frozen=True)
class Admitted:
    """A teacher that has passed, and what was measured of it."""

    teacher: Teacher
    fidelity: Fidelity | None
    """How near a teacher in FP8 is to itself in bfloat16; None for any other."""
    dropped: DroppedMass | None
    """What the teacher gives to ids that the student does not share; None where it has no such ids."""
    bos_losses: BosLosses | None = None
    """Loss of an imported teacher with and without BOS; None where the data has its BOS, or it knows none."""


def admit(
    checkpoint: TeacherCheckpoint,
    salt: SaltConfig,
    head: TeacherHead,
    *,
    dtype: torch.dtype,
    microbatches_per_forward: int,
    timeout: timedelta,
    precision: Precision = TORCH,
    text: Sequence[Microbatch] = (),
    windows: Sequence[Microbatch] = (),
    bos: int | None = None,
    with_body: bool = True,
    guided: GuidedLayer | None = None,
    look: Look = stay,
) -> Admitted:
    """Build, load and verify the teacher. Collective over all ranks. Raises UserError.

    text: samples by which a teacher in FP8 is compared with itself in bfloat16, the same on every rank. windows: samples on which the
    probability of ids that are not shared is measured, the same on every rank. bos: see `shared_vocabulary.missing_bos`; on the windows the
    loss is measured with and without it. with_body: False: the output weight alone, for a run whose cache holds all that the layers would
    compute; nothing can be measured then, and the run that filled the cache did. guided: the layer that hidden states guide. look: called
    between the phases and between the microbatches of each check. The student's random numbers stay as they are.
    """
    student = head.student
    layout = teacher_layout(student.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    found = loading.open_checkpoint(checkpoint.directory, fallback=False, flag_name="--teacher-load", look=look)
    assert found is not None, checkpoint.directory
    look("reading the teacher's checkpoint")
    mesh = make_teacher_mesh(layout, timeout)
    block_group = new_group_of(student.layout.groups("tp", "cp", "pp"), timeout, "block of the teacher")
    warm_up(block_group)
    body = load_body(checkpoint, salt, mesh, found, dtype, precision) if with_body else None
    look("loading the teacher")
    whole, dropped, bos_losses, fidelity = head_with_all_ids(head, checkpoint.vocabulary_size), None, None, None
    weight = load_output_weight(checkpoint, whole, dtype) if salt.has_soft_labels else None
    teacher = Teacher(
        body, weight, mesh, student, block_group, microbatches_per_forward=microbatches_per_forward,
        temperature=lowest_temperature(salt), shared_ids=head.shared_ids, gate=parse_gate(salt.kd_gate), guided=guided,
    )  # fmt: skip
    if not salt.has_soft_labels:
        if body is not None:
            refuse_empty_hidden_states(teacher, checkpoint, head.seq_length, look)
        return Admitted(teacher, None, None)
    if body is not None:
        with in_bfloat16(body):
            verify(teacher, checkpoint, whole, dtype, look)
            if checkpoint.vocabulary_size > head.shared_ids:
                limit, temperatures = salt.teacher_max_dropped_mass, checked_temperatures(salt)
                dropped = refuse_dropped_mass(teacher, limit, windows, whole, head.shared_ids, temperatures, look)
            if bos is not None:
                bos_losses = losses_with_bos(teacher, bos, windows, whole, look)
    if whole is not head and teacher.weight is not None:
        teacher.replace_weight(cut_rows(teacher.weight, whole.shard, head.shard, head.shared_ids))
    if body is not None and body.precision.fp8_format is not None:
        fidelity = refuse_unfaithful(teacher, salt.teacher_fp8_max_kl, text, head, look)
        keep_fp8_alone(body)
    look("checking the teacher")
    return Admitted(teacher, fidelity, dropped, bos_losses)


def load_body(
    checkpoint: TeacherCheckpoint,
    salt: SaltConfig,
    mesh: Mesh,
    opened: OpenedCheckpoint,
    dtype: torch.dtype,
    precision: Precision,
) -> GPT:
    """This rank's stage of the teacher, without output head. Collective over all ranks. Raises UserError."""
    body = build_body(checkpoint, salt, mesh, dtype, precision)
    state = sharded_state.model_state([body], mesh.groups)
    loading.refuse_mismatches(opened.directory, sharded_state.mismatches(state, opened.sizes))
    sharded_state.load_model([body], sharded_state.load(state, opened.directory, mesh.groups))
    return body


def build_body(checkpoint: TeacherCheckpoint, salt: SaltConfig, mesh: Mesh, dtype: torch.dtype, precision: Precision) -> GPT:
    """This rank's stage of the teacher, without output head and with undefined weights. The random state does not change."""
    names, before = rng.capture()
    config = transformer_config(checkpoint.model, teacher_parallel(salt), dtype, precision)
    config.perform_initialization = False
    body = GPT(
        config, checkpoint.model, vocabulary_size=checkpoint.vocabulary_size, seq_length=checkpoint.seq_length, chunk_tokens=1,
        groups=mesh.groups, pre_process=mesh.is_first_stage, post_process=mesh.is_last_stage, vp_stage=None, has_head=False,
        precision=precision,
    )  # fmt: skip
    rng.restore(names, before)
    return body


def verify(teacher: Teacher, checkpoint: TeacherCheckpoint, head: TeacherHead, dtype: torch.dtype, look: Look = stay) -> None:
    """Run the teacher as in a training step. Raise UserError unless its losses are those that its checkpoint recorded. Collective."""
    lengths = [length for length in checkpoint.lengths if length <= head.seq_length]
    losses = losses_of(teacher, checkpoint.vocabulary_size, lengths, head, look)
    dtypes = {checkpoint.dtype, str(dtype).removeprefix("torch.")}
    tolerance = max(TOLERANCE[name] for name in dtypes)
    wrong = [
        f"{recorded:.5f} over {length} tokens when saved, {loss:.5f} here"
        for length, recorded, of_replicas in zip(lengths, checkpoint.losses, losses, strict=False)
        for loss in of_replicas
        if not math.isclose(loss, recorded, rel_tol=tolerance)  # not isclose() also rejects NaN
    ]
    problem = first_problem("; ".join(wrong) or None)
    if problem is not None:
        raise UserError(
            f"the teacher in --teacher-load {checkpoint.directory} is not what was saved: of its losses on the fixed batch, "
            f"{problem} (tolerance {tolerance:g} of it)"
        )
    log.info(
        "teacher %s: its recorded loss of %.4f over %d tokens, computed by %s, came out as %.4f",
        checkpoint.directory,
        checkpoint.losses[len(lengths) - 1],
        lengths[-1],
        checkpoint.recorded_by,
        losses[-1][0],
    )


@torch.no_grad()
def losses_of(
    teacher: Teacher, vocabulary_size: int, lengths: list[int], head: TeacherHead, look: Look = stay
) -> list[list[float]]:
    """Mean cross entropy over the first `lengths` tokens of each fixed microbatch, for each teacher replica of the block:
    [lengths][replicas]. Phases A and B, then the teacher's own head. Collective over all ranks; all ranks of a block receive."""
    sums = torch.zeros(len(lengths), teacher.replicas, len(METRICS), dtype=torch.float64, device=current_device())
    positions = head.own_positions()
    for number, microbatch in enumerate(fixed_batch(vocabulary_size, head.seq_length, lengths)):
        look("checking the teacher")
        labels = microbatch.labels[0, positions].to(current_device())
        mask = microbatch.loss_mask[0, positions].to(current_device())
        for replica, hidden in enumerate(teacher.hidden_states([microbatch] * teacher.replicas, merge=1)):
            if hidden is not None and teacher.weight is not None:
                metrics = fused_linear_cross_entropy(hidden, teacher.weight, labels, mask, head.shard, head.chunk_tokens)[1]
                sums[number, replica] = metrics
    dist.all_reduce(sums, group=teacher.block_group)  # every tp rank of the last stage has the same: the ratio does not change
    return (sums[..., METRICS.index("loss")] / sums[..., METRICS.index("tokens")]).tolist()


def refuse_trainable(teacher: Teacher, optimized: Iterable[Tensor]) -> None:
    """Assert that no tensor of the teacher requires a gradient, or shares memory with a tensor that the optimizer changes."""
    own = teacher.tensors
    assert not any(tensor.requires_grad for tensor in own), "a parameter of the teacher requires a gradient"
    storages = {raw.untyped_storage().data_ptr() for tensor in own for raw in raw_tensors(tensor) if raw.numel()}
    moved = {tensor.untyped_storage().data_ptr() for tensor in optimized if tensor.numel()}
    assert not storages & moved, "a tensor of the teacher is in the optimizer"
