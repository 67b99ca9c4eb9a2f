"""A small teacher and a student that learns from it: called in every rank of `run_ranks`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, ModelConfig, SaltConfig, TokenizerConfig
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.salt import load_teacher, teacher_checkpoint
from megatron_salt.salt.guidance.layer_place import guided_layer
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.salt.teacher import Teacher, TeacherHead
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.train.evaluate import reference_losses
from megatron_salt.train.step import Student, train_step
from tests.support.small import SEQ_LENGTH, SMALL, VOCABULARY, Case, batch, build_student, train_student

TEACHER = replace(SMALL, num_layers=2, hidden_size=48, ffn_hidden_size=96, untie_embeddings_and_output_weights=True)
"""Narrower than the student, so that nothing can take one's hidden states for the other's."""

TIED_TEACHER = replace(
    TEACHER,
    untie_embeddings_and_output_weights=False,
    position_embedding_type="learned_absolute",
    make_vocab_size_divisible_by=4,
)  # 252 rows where the student has 256
CHUNK_TOKENS = 24


def make_teacher(directory: Path, model: ModelConfig = TEACHER, steps: int = 2, dtype: torch.dtype = torch.float32) -> None:
    """Train a teacher for a moment on one rank, and save it."""
    case = Case(model=model, dtype=dtype)
    student = build_student(case, 1, seed=77)
    train_student(student, case, steps)
    save_teacher(student, directory, model, steps)


def save_teacher(student: Student, directory: Path, model: ModelConfig, steps: int) -> None:
    """Save a model that one rank has trained."""
    identity = RunIdentity(
        yaml="", architecture=asdict(model) | {"seq_length": SEQ_LENGTH, "vocabulary": VOCABULARY},
        tokenizer_fingerprint="tokenizer:aaaa", data_fingerprint="data:aaaa", seed=1,
    )  # fmt: skip
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    checkpointer = Checkpointer(
        CheckpointConfig(save=str(directory)),
        identity,
        tokenizer,
        student.mesh,
        chunks=student.chunks,
        optimizer=None,
        scheduler=None,
    )
    checkpointer.save(RunState(step=steps), final=True, reference_losses=reference_losses(student, VOCABULARY))


@dataclass(frozen=True)
class Lesson:
    """A student's case and what it is taught with."""

    case: Case
    load: str
    teacher: tuple[int, int] = (1, 1)
    """tp, pp"""
    merge: int = 1
    """Microbatches that the teacher takes at once."""
    kd_weight: float = 0.667
    temperature: float = 0.25
    guide: Literal["soft-labels", "hidden", "both"] = "soft-labels"
    let_weight: float = 0.1
    let_layer: int = 1

    @property
    def salt(self) -> SaltConfig:
        """The lesson's flags."""
        guidance: dict[str, Any] = {}
        if self.guide != "soft-labels":
            guidance = dict(let_steps=10, let_weight=self.let_weight, let_layer=self.let_layer, let_decay="step")
        return SaltConfig(
            teacher_load=self.load, teacher_tensor_model_parallel_size=self.teacher[0], kd_weight=self.kd_weight,
            teacher_pipeline_model_parallel_size=self.teacher[1], kd_teacher_temperature=self.temperature, guide=self.guide,
            kd_steps=None if self.guide == "hidden" else 10, **guidance,
        )  # fmt: skip

    @property
    def weights(self) -> StepWeights:
        """Of each step."""
        return StepWeights(
            soft_labels=None if self.guide == "hidden" else self.kd_weight,
            hidden=None if self.guide == "soft-labels" else self.let_weight,
        )


def head_of(student: Student, case: Case) -> TeacherHead:
    """How the student's last stage computes the teacher's head."""
    rows = case.model.padded_vocabulary_size(VOCABULARY) // student.mesh.layout.tensor
    shard = VocabularyShard(student.mesh.groups.tp, rows, VOCABULARY, sequence_parallel=True)
    return TeacherHead(student.mesh, shard, SEQ_LENGTH, CHUNK_TOKENS, VOCABULARY)


def admit(lesson: Lesson, student: Student) -> Teacher:
    """The lesson's teacher over the student's ranks."""
    checkpoint = teacher_checkpoint.read_teacher(lesson.load)
    teacher_checkpoint.refuse_unfit(checkpoint, lesson.salt, SEQ_LENGTH)
    return load_teacher.admit(
        checkpoint,
        lesson.salt,
        head_of(student, lesson.case),
        dtype=lesson.case.dtype,
        microbatches_per_forward=lesson.merge,
        timeout=timedelta(minutes=1),
        guided=guided_layer(lesson.salt, lesson.case.model, lesson.case.parallel),
    ).teacher


@dataclass(frozen=True)
class Taught:
    """Sums of metrics and gradient norms of lessons, the same on every rank."""

    sums: list[list[float]]
    """[steps][metrics], over all replicas."""
    grad_norms: list[float] = field(default_factory=list)


def teach(lesson: Lesson, world_size: int, weights: Path | None = None, steps: int = 3) -> Taught:
    """A few steps of stage 1. Collective over all ranks."""
    student = build_student(lesson.case, world_size, weights)
    return lessons(student, admit(lesson, student), lesson, steps)


def lessons(student: Student, teacher: Teacher | None, lesson: Lesson, steps: int, start: int = 0) -> Taught:
    """Steps of a student that exists, with a teacher or without."""
    all_sums, grad_norms = [], []
    for step in range(start, start + steps):
        outcome = train_step(student, batch(student, lesson.case, step), PhaseTimer(), teacher, lesson.weights)
        mine: list[list[float]] = [[]] * world()
        dist.all_gather_object(mine, [] if outcome.sums is None else outcome.sums.double().sum(0).tolist())
        shares = torch.tensor([sums for sums in mine if sums], dtype=torch.float64)
        all_sums.append((shares.sum(0) / student.mesh.layout.tensor).tolist())
        grad_norms.append(outcome.grad_norm)
    return Taught(all_sums, grad_norms)


def world() -> int:
    """The number of all ranks."""
    return dist.get_world_size()
