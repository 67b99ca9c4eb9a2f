"""What a traced model says: how memory rises and falls through the parts of one forward and one backward pass. Pure.

The parts are the embedding, one layer, and the head (final norm, logits and loss). From their traces `compose.py` makes models of any
number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.precision import Precision

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Part:
    """One part of a pass."""

    peak: int
    """The most bytes at one time, above those at its start"""
    change: int
    """Bytes at its end less those at its start"""


NOTHING = Part(0, 0)


@dataclass(frozen=True, kw_only=True)
class ChunkTrace:
    """A forward pass of one microbatch, and where a model is trained its backward pass."""

    embedding: Part
    layer: Part
    head: Part
    head_backward: Part
    layer_backward: Part
    embedding_backward: Part
    hidden: int
    """Bytes of the hidden states between two layers"""
    before_layer: int
    """Bytes that are alive where the layer in the middle begins, above those where the pass does"""
    kept: int
    """Bytes of buffers that the first pass makes and later ones reuse"""


@dataclass(frozen=True, kw_only=True)
class StudentRequest:
    """A model chunk of the student, to trace."""

    first: bool
    """Whether it has the embedding"""
    last: bool
    """Whether it has the final norm and the head"""
    samples: int
    """Samples of a microbatch"""
    teacher_hidden: int | None
    """Hidden size of the teacher that the head compares with; None without one"""


@dataclass(frozen=True, kw_only=True)
class TeacherRequest:
    """The teacher's layers, to trace."""

    model: ModelConfig
    vocabulary_size: int
    tensor: int
    """Tensor-parallel ranks of the teacher"""
    samples: int
    """Samples of one forward pass"""


@dataclass(frozen=True, kw_only=True)
class TraceSetting:
    """What all traces of a run share."""

    model: ModelConfig
    parallel: ParallelConfig
    """Of the student. Its pipeline sizes do not matter."""
    seq_length: int
    vocabulary_size: int
    chunk_tokens: int
    """Most tokens whose logits the head computes at one time"""
    bf16: bool
    documents: bool
    """Whether attention stays inside documents, so that it takes a mask"""
    precision: Precision
    """Of the student's layers"""


@dataclass(frozen=True, kw_only=True)
class TraceTask:
    """The traces of a run, for one child process."""

    setting: TraceSetting
    device: Device
    student: tuple[StudentRequest, ...]
    teacher: TeacherRequest | None


@dataclass(frozen=True, kw_only=True)
class Traces:
    """The answers to a task."""

    student: dict[StudentRequest, ChunkTrace]
    teacher: ChunkTrace | None


def alone(parallel: ParallelConfig) -> ParallelConfig:
    """The flags of one chunk by itself: no pipeline, and each layer computed once. Whole layers that are recomputed are composed."""
    return ParallelConfig(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity="selective" if parallel.recompute_granularity == "selective" else None,
    )
