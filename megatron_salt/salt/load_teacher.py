"""From --teacher-load to a `Teacher`: read its checkpoint, refuse it where it does not fit, load its weights, and verify them.

Cheap checks come before expensive ones.
1. Before ranks join: read the facts of the checkpoint, and compare them with the run's.
2. Build the body on the teacher's own groups, and load it. Load the output weight straight to the student's last stage.
3. Run the teacher in the way of a training step. It must reproduce the losses that its checkpoint recorded. In FP8 its predictions must
   stay near those in bfloat16 (`fp8_check.py`).
Everything that does not fit is a UserError that names both sides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_salt.checkpoint import loading, rng, save_directory, sharded_state
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.config import ModelConfig, ParallelConfig, SaltConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.model.fp8_teacher import in_bfloat16, keep_fp8_alone, raw_tensors
from megatron_salt.model.gpt import GPT, transformer_config
from megatron_salt.model.loss import METRICS, fused_linear_cross_entropy
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.collectives import first_problem
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh, make_teacher_mesh, new_group_of, warm_up
from megatron_salt.salt.fp8_check import Fidelity, refuse_unfaithful
from megatron_salt.salt.routing import teacher_layout
from megatron_salt.salt.teacher import Teacher, TeacherHead
from megatron_salt.selection.score_format import IndexManifest
from megatron_salt.small_files import one_line

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-3}
"""Largest relative difference between a loss and the recorded one; the coarser of both precisions counts. Small models differ by 1e-6
between layouts in float32, and by 3e-4 where either side is bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """The facts of a teacher's checkpoint."""

    directory: Path
    model: ModelConfig
    vocabulary_size: int
    """Real ids of its tokenizer."""
    seq_length: int
    """--seq-length that it was trained with."""
    tokenizer_fingerprint: str
    fingerprint: str
    """Fingerprint of the checkpoint's contents; the path does not matter."""
    lengths: tuple[int, ...]
    """Lengths of the fixed batch on which it recorded its loss, see data/reference_batch.py."""
    losses: tuple[float, ...]
    """The recorded loss for each length, nats a token."""
    dtype: str
    """Precision of the recorded losses: float32 or bfloat16."""
    recorded_by: str = "the run that saved it"
    """Whose losses they are, in words."""
    step: int
    """Steps that it was trained for."""


def read_teacher(load: str) -> TeacherCheckpoint:
    """Read the facts of --teacher-load. Every rank reads the same small files, without torch.distributed. Raises UserError."""
    paths = save_directory.candidates(Path(load), flag_name="--teacher-load")
    if not paths:
        missing = "" if Path(load).is_dir() else " (there is no such directory)"
        missing = " (its first save is not finished)" if any(Path(load).glob("iter_*")) else missing
        raise UserError(
            f"--teacher-load {load} holds no checkpoint{missing}; a teacher is what a run of this trainer leaves in its "
            "--save, one iter_* directory or several; examples/teacher_1p5b.sh trains one"
        )
    try:
        saved, fingerprint = read_state(paths[0]), loading.checkpoint_fingerprint(paths[0])
    except UserError as error:
        raise UserError(f"--teacher-load: {error}") from None
    recorded = saved.reference_losses
    losses = () if recorded is None else tuple(loss for loss in recorded.losses if loss is not None)
    if recorded is None or len(losses) < len(recorded.losses):
        raise UserError(
            f"--teacher-load {paths[0]} has no record of its own loss to be recognised by (it was not finite, or an earlier "
            "release saved it); save it again from a run that resumes it"
        )
    if saved.vocabulary_size is None or saved.seq_length is None:
        raise UserError(f"--teacher-load {paths[0] / save_directory.STATE}: its architecture lacks vocabulary or seq_length")
    return TeacherCheckpoint(
        directory=paths[0],
        model=model_of(saved.architecture),
        vocabulary_size=saved.vocabulary_size,
        seq_length=saved.seq_length,
        tokenizer_fingerprint=saved.tokenizer,
        fingerprint=fingerprint,
        lengths=recorded.lengths,
        losses=losses,
        dtype=recorded.dtype,
        recorded_by=one_line(recorded.origin),
        step=saved.run.step,
    )


def model_that_scored(scores: IndexManifest, teacher: TeacherCheckpoint | None) -> ModelConfig | None:
    """The architecture of the teacher that made these scores, where it is the run's teacher or the checkpoint that the index names; else
    None. Not collective."""
    if teacher is None or teacher.fingerprint != scores.teacher:
        try:
            teacher = read_teacher(scores.teacher_directory)
        except (UserError, OSError):
            return None
    return teacher.model if teacher.fingerprint == scores.teacher else None


def refuse_unfit(
    teacher: TeacherCheckpoint, salt: SaltConfig, tokenizer_fingerprint: str, vocabulary_size: int, seq_length: int
) -> None:
    """Raise UserError where the teacher cannot teach the student, whose tokenizer, vocabulary and length are given. Pure."""
    where = f"--teacher-load {teacher.directory}"
    if teacher.vocabulary_size != vocabulary_size:
        raise UserError(
            f"{where} has a vocabulary of {teacher.vocabulary_size} ids, the student's tokenizer has {vocabulary_size}"
        )
    if teacher.tokenizer_fingerprint != tokenizer_fingerprint:
        raise UserError(
            f"{where} was trained with tokenizer {teacher.tokenizer_fingerprint}, this run has {tokenizer_fingerprint}"
        )
    if teacher.seq_length < seq_length:
        raise UserError(
            f"{where} was trained on --seq-length {teacher.seq_length}, shorter than this run's --seq-length {seq_length}"
        )
    if min(teacher.lengths) > seq_length:
        raise UserError(
            f"{where} recorded its loss on {min(teacher.lengths)} tokens at least, and --seq-length is {seq_length}"
        )
    try:
        check_shapes(teacher.model, teacher_parallel(salt), seq_length)
    except UserError as error:
        message = (
            str(error)
            .replace("--tensor-model", "--teacher-tensor-model")
            .replace("--pipeline-model", "--teacher-pipeline-model")
        )
        raise UserError(f"{where}: {message}") from None


def teacher_parallel(salt: SaltConfig) -> ParallelConfig:
    """The teacher's parallel sizes, as the flags of a model that is trained alone."""
    return ParallelConfig(
        tensor_model_parallel_size=salt.teacher_tensor_model_parallel_size,
        pipeline_model_parallel_size=salt.teacher_pipeline_model_parallel_size,
    )


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
    look: Look = stay,
) -> tuple[Teacher, Fidelity | None]:
    """Build, load and verify the teacher; a teacher in FP8 comes with its fidelity. Collective over all ranks. Raises UserError.

    text: samples by which a teacher in FP8 is compared with itself in bfloat16, the same on every rank. look: called between the phases
    and between the microbatches of each check. The student's random numbers stay as they are.
    """
    student = head.student
    layout = teacher_layout(student.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    found = loading.open_checkpoint(checkpoint.directory, fallback=False, flag_name="--teacher-load", look=look)
    assert found is not None, checkpoint.directory
    look("reading the teacher's checkpoint")
    mesh = make_teacher_mesh(layout, timeout)
    block_group = new_group_of(student.layout.groups("tp", "cp", "pp"), timeout, "block of the teacher")
    warm_up(block_group)
    body = build_body(checkpoint, salt, mesh, dtype, precision)
    state = sharded_state.model_state([body], mesh.groups)
    loading.refuse_mismatches(found.directory, sharded_state.mismatches(state, found.sizes))
    sharded_state.load_model([body], sharded_state.load(state, found.directory, mesh.groups))
    look("loading the teacher")
    weight = load_output_weight(checkpoint, head, dtype)
    teacher = Teacher(
        body,
        weight,
        mesh,
        student,
        block_group,
        microbatches_per_forward=microbatches_per_forward,
        temperature=salt.kd_teacher_temperature,
    )
    with in_bfloat16(body):
        verify(teacher, checkpoint, head, dtype, look)
    fidelity = None
    if body.precision.fp8_format is not None:
        fidelity = refuse_unfaithful(teacher, salt.teacher_fp8_max_kl, text, head, look)
        keep_fp8_alone(body)
    look("checking the teacher")
    return teacher, fidelity


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


def load_output_weight(checkpoint: TeacherCheckpoint, head: TeacherHead, dtype: torch.dtype) -> Tensor | None:
    """The teacher's output weight [V/tp, h_t], cut like the student's, on ranks of the student's last stage; None elsewhere.

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
            f"the teacher in --teacher-load {checkpoint.directory} is not what was saved: its loss on the fixed batch was "
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
    own = [*teacher.body.parameters(), *teacher.body.buffers(), *([] if teacher.weight is None else [teacher.weight])]
    assert not any(tensor.requires_grad for tensor in own), "a parameter of the teacher requires a gradient"
    storages = {raw.untyped_storage().data_ptr() for tensor in own for raw in raw_tensors(tensor) if raw.numel()}
    moved = {tensor.untyped_storage().data_ptr() for tensor in optimized if tensor.numel()}
    assert not storages & moved, "a tensor of the teacher is in the optimizer"
