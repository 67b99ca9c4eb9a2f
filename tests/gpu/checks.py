"""What the GPU tests do on a rank: plain functions, which run on any device (tests/gpu/test_on_the_cpu.py runs them without a GPU)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt.checkpoint import sharded_state
from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import UserError
from megatron_salt.model.precision import Fp8Recipe, Precision
from megatron_salt.model.precision_checks import refuse_precision
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.launch import find_hardware
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.train.step import Student
from tests.support.small import SEQ_LENGTH, SMALL, VOCABULARY, Case, Curve, build_student, train_student
from tests.support.teaching import Lesson, admit

RECIPES: tuple[Fp8Recipe, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
ENGINE = Precision(implementation="transformer_engine")
WIDE = replace(SMALL, num_layers=2, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2)
"""Every product of it has dimensions that are multiples of 128, as blockwise FP8 needs, with four samples of 32 tokens at once."""


def in_fp8(recipe: Fp8Recipe) -> Precision:
    """Transformer Engine's layers with FP8 by a recipe; delayed with the history that its curve needs."""
    return replace(ENGINE, fp8_format="hybrid", fp8_recipe=recipe, amax_history_len=16 if recipe == "delayed" else 1)


def why_not(precision: Precision) -> str | None:
    """Why this machine cannot do it, in the words of the program."""
    hardware = find_hardware()
    if precision.implementation == "transformer_engine" and hardware.transformer_engine is None:
        return "Transformer Engine is not installed"
    try:
        refuse_precision(precision, hardware, bf16=True, distributed_optimizer=False)
    except UserError as error:
        return str(error)
    return None


def skip_unless(precision: Precision) -> None:
    """Skip a test that this machine cannot run, with the reason."""
    import pytest  # here: tests/gpu/first_run.py runs where it is not installed

    if (reason := why_not(precision)) is not None:
        pytest.skip(reason)


def leave_mesh() -> None:
    """So that another one can be made."""
    parallel_state.destroy_model_parallel()


# ---- training --------------------------------------------------------------------------------------------------------------------


def student_from(case: Case, world_size: int, weights: Path) -> Student:
    """The case's student, whatever its layers are made of, with weights that plain torch layers wrote."""
    student = build_student(case, world_size)
    chunks = [sharded_state.unwrapped(chunk) for chunk in student.chunks]
    state = sharded_state.model_state(chunks, student.mesh.groups)
    sharded_state.load_model(chunks, sharded_state.load(state, weights, student.mesh.groups))
    student.optimizer.reload_model_params()
    return student


def curve(case: Case, weights: Path, steps: int) -> Curve:
    """Losses and gradient norms of a few steps, on one rank, which is then free for another model."""
    told = train_student(student_from(case, 1, weights), case, steps)
    leave_mesh()
    return told


# ---- a teacher -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchanged:
    """A teacher's hidden states of some microbatches on one rank, on the CPU."""

    here: list[Tensor]
    """[s, b, h] each: as this rank's own replica computes them."""
    received: list[Tensor | None]
    """[s / tp, b, h] each: as they came out of the exchange; None but on the student's last stage."""
    tp: tuple[int, int]
    """This rank among the student's tensor-parallel ranks, and their number."""


def exchange(lesson: Lesson, world_size: int) -> Exchanged:
    """Phases A and B for four microbatches, and the same by each rank's own replica of the teacher, which here is whole."""
    assert lesson.teacher == (1, 1)
    student = build_student(lesson.case, world_size)
    teacher = admit(lesson, student)
    batch = fixed_batch(VOCABULARY, SEQ_LENGTH, [SEQ_LENGTH] * 4)
    received = teacher.hidden_states(batch, merge=1)
    device = current_device()
    with torch.no_grad():
        here = [teacher.body(one.tokens.to(device), one.position_ids.to(device), None) for one in batch]
    at, layout = student.mesh.at, student.mesh.layout
    return Exchanged(
        [one.cpu() for one in here], [None if one is None else one.cpu() for one in received], (at.tp, layout.tensor)
    )


def assert_exchanged(told: list[Exchanged]) -> None:
    """Every rank of the last stage has its slice of what any rank computes, to the bit."""
    receivers = [one for one in told if one.received[0] is not None]
    assert receivers
    for one in receivers:
        rank, size = one.tp
        for number, part in enumerate(one.received):
            assert part is not None
            for computed in told:
                assert torch.equal(part, computed.here[number].chunk(size)[rank])


# ---- scores ----------------------------------------------------------------------------------------------------------------------


def assert_same_scores(one: Path, other: Path) -> None:
    """Two score indices of the same windows, but for a window in a hundred to 1e-3."""
    first, second = (ScoreIndex.open([str(directory)]) for directory in (one, other))
    assert first.columns == second.columns and first.num_samples == second.num_samples > 0
    for name in first.columns:
        a, b = (index.read(name, 0, index.num_samples) for index in (first, second))
        near = np.abs(a - b) <= 1e-3 if a.dtype.kind == "f" else a == b
        assert near.mean() >= 0.99, (name, near.mean())
