"""The facts of a teacher's checkpoint, and whether they fit the run. Read before ranks join; not collective.

Everything that does not fit is a UserError that names both sides. Whether ids mean the same is asked in `shared_vocabulary.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_salt.checkpoint import loading, save_directory
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.config import ModelConfig, ParallelConfig, SaltConfig
from megatron_salt.errors import UserError
from megatron_salt.model.shapes import check_shapes
from megatron_salt.selection.score_format import IndexManifest
from megatron_salt.small_files import one_line


@dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """The facts of a teacher's checkpoint."""

    directory: Path
    model: ModelConfig
    vocabulary_size: int
    """Ids in its softmax. A converted model may have more than its tokenizer."""
    seq_length: int
    """--seq-length that it was trained with; of an imported model its context."""
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
    imported: bool = False
    """Whether its weights came from another program."""


def read_teacher(load: str) -> TeacherCheckpoint:
    """Read the facts of --teacher-load. Every rank reads the same small files, without torch.distributed. Raises UserError."""
    paths = save_directory.candidates(Path(load), flag_name="--teacher-load")
    if not paths:
        missing = "" if Path(load).is_dir() else " (there is no such directory)"
        missing = " (its first save is not finished)" if any(Path(load).glob("iter_*")) else missing
        if how := save_directory.how_to_import(Path(load)):
            raise UserError(f"--teacher-load {load} holds no checkpoint{how}")
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
        imported=any(event["event"] == "import" for event in saved.run.events),
    )


def model_that_scored(scores: IndexManifest, teacher: TeacherCheckpoint | None) -> ModelConfig | None:
    """The architecture of the teacher that made these scores, where it is the run's teacher or the checkpoint that the index names; else
    None. Not collective."""
    return model_of_teacher(scores.teacher, scores.teacher_directory, teacher)


def model_of_teacher(fingerprint: str, directory: str, teacher: TeacherCheckpoint | None) -> ModelConfig | None:
    """The architecture of the teacher with this fingerprint, where it is `teacher` or lies in `directory`; else None. Not collective."""
    if teacher is None or teacher.fingerprint != fingerprint:
        try:
            teacher = read_teacher(directory)
        except (UserError, OSError):
            return None
    return teacher.model if teacher.fingerprint == fingerprint else None


def refuse_unfit(teacher: TeacherCheckpoint, salt: SaltConfig, seq_length: int) -> None:
    """Raise UserError where the teacher cannot read the student's samples, or cannot be split as the flags say. Pure."""
    where = f"--teacher-load {teacher.directory}"
    if teacher.seq_length < seq_length:
        shorter = f"shorter than this run's --seq-length {seq_length}"
        if teacher.imported:
            raise UserError(f"{where} is an imported model whose context is {teacher.seq_length} tokens, {shorter}")
        raise UserError(f"{where} was trained on --seq-length {teacher.seq_length}, {shorter}")
    if salt.has_soft_labels and min(teacher.lengths) > seq_length:
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
