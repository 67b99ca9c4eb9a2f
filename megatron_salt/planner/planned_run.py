"""The run that is planned: flags, layout and what the planner knows beside them; and what has to be traced for it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_salt.config import ModelConfig, RunConfig, SaltConfig
from megatron_salt.model.loss_chunk import chunk_tokens
from megatron_salt.model.precision import Precision
from megatron_salt.parallel.hardware import Capability
from megatron_salt.parallel.layout import Layout
from megatron_salt.planner.trace import Device, StudentRequest, TeacherRequest, TraceSetting, TraceTask
from megatron_salt.train.plan import RunPlan

RELEASES = {"cuda": (13, 0), "transformer_engine": (2, 20)}
"""CUDA and Transformer Engine that a planned GPU is taken to have: those of requirements-gpu.txt."""


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """A run as its flags give it. `config` has passed `train/plan.py`, which gave layout and plan."""

    config: RunConfig
    layout: Layout
    plan: RunPlan
    vocabulary_size: int | None
    """Ids of the tokenizer; None: read it"""
    teacher_config: str | None
    """YAML file with the teacher's architecture, for a teacher that has no checkpoint yet"""
    device: Device
    capability: Capability | None
    cached_share: float = 0.0
    """See `PlannedRun`"""


@dataclass(frozen=True, kw_only=True)
class PlannedTeacher:
    """The teacher of the run."""

    model: ModelConfig
    vocabulary_size: int
    precision: Precision
    trained_tokens: int | None = None
    """Tokens of its own training; None: not known"""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run, before it starts. `config` has passed `train/plan.py`, which gave layout and plan."""

    config: RunConfig
    layout: Layout
    plan: RunPlan
    vocabulary_size: int
    """Ids of the tokenizer"""
    precision: Precision
    """The student's"""
    teacher: PlannedTeacher | None
    device: Device
    capability: Capability | None
    """Of the GPU; None on a CPU"""
    cached_share: float = 0.0
    """Share of the samples of stage 1 whose hidden states a cache holds when the run begins"""

    @property
    def loads_teacher_layers(self) -> bool:
        """Whether a run with a teacher has its layers. A whole cache makes them needless, but FP8 is checked before the first step."""
        return self.cached_share < 1 or (self.teacher is not None and self.teacher.precision.quantized)

    @property
    def rows(self) -> int:
        """Rows of embedding and output weight on a rank."""
        return self.config.model.padded_vocabulary_size(self.vocabulary_size) // self.layout.tensor

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        return 2 if self.config.training.bf16 else 4

    @property
    def head_teacher(self) -> PlannedTeacher | None:
        """The teacher whose output layer the student's last stage computes in stage 1. None: no teacher, or one without soft labels."""
        return self.teacher if self.config.salt.has_soft_labels else None

    def stage1_parts(self) -> tuple[tuple[int, PlannedRun], ...]:
        """(steps, the run with a teacher that teaches what is taught in them) of stage 1, in their order. None without a teacher.

        There are two where soft labels and hidden-state guidance do not end together.
        """
        salt, total = self.config.salt, self.plan.total_steps
        if self.teacher is None or salt.stage1_steps is None:
            return ()
        last = min(salt.stage1_steps, total)
        first = min(salt.kd_steps or last, salt.let_steps or last, last)
        if first == last:
            return ((last, self),)
        longer = _taught_alone(salt, "soft-labels" if salt.kd_steps == salt.stage1_steps else "hidden")
        return ((first, self), (last - first, replace(self, config=replace(self.config, salt=longer))))

    def without_fp8(self) -> PlannedRun:
        """The same run with products in bfloat16 or float32."""
        teacher = self.teacher
        if teacher is not None:
            teacher = replace(teacher, precision=replace(teacher.precision, fp8_format=None))
        precision = replace(self.precision, fp8_format=None, fp8_params=False, fp4_format=None)
        return replace(self, precision=precision, teacher=teacher)

    def ends(self) -> tuple[tuple[bool, bool], ...]:
        """(has the embedding, has the head) of the kinds of model chunks that are traced."""
        return ((True, False), (False, True)) if self.layout.pipeline > 1 else ((True, True),)

    def student_requests(self, taught: bool) -> dict[tuple[bool, bool], StudentRequest]:
        """What is traced of the student in stage 1 (taught) or stage 2, by `ends`."""
        samples = self.plan.micro_batch_size if taught else self.plan.stage2_micro_batch_size
        teacher_hidden = self.head_teacher.model.hidden_size if taught and self.head_teacher is not None else None
        return {
            (first, last): StudentRequest(
                first=first, last=last, samples=samples, teacher_hidden=teacher_hidden if last else None
            )
            for first, last in self.ends()
        }

    def trace_task(self) -> TraceTask:
        """Everything to trace."""
        config, salt = self.config, self.config.salt
        setting = TraceSetting(
            model=config.model, parallel=config.parallel, seq_length=config.training.seq_length, vocabulary_size=self.vocabulary_size,
            chunk_tokens=chunk_tokens(config.training, self.rows, self.device), bf16=config.training.bf16,
            documents=config.data.reset_attention_mask, precision=self.precision,
        )  # fmt: skip
        asked = list(self.student_requests(taught=False).values())
        teacher = None
        if self.teacher is not None:
            asked += self.student_requests(taught=True).values()
            teacher = TeacherRequest(
                model=self.teacher.model, vocabulary_size=self.teacher.vocabulary_size,
                tensor=salt.teacher_tensor_model_parallel_size, samples=self.plan.micro_batch_size * self.plan.teacher_merge,
            )  # fmt: skip
        return TraceTask(setting=setting, device=self.device, student=tuple(dict.fromkeys(asked)), teacher=teacher)


def _taught_alone(salt: SaltConfig, guide: Literal["soft-labels", "hidden"]) -> SaltConfig:
    """The flags of a run that teaches one of two things. Its teacher keeps its precision, which `PlannedTeacher` has."""
    others = ("let_",) if guide == "soft-labels" else ("kd_", "teacher_fp8_", "teacher_max_dropped_mass")
    return replace(
        salt,
        guide=guide,
        **{leaf.name: leaf.default for leaf in fields(salt) if leaf.name.startswith(others)},  # type: ignore[arg-type]
    )
