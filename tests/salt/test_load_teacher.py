"""A teacher may teach only where it fits the student and is the model that its checkpoint describes."""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt.config import ParallelConfig, SaltConfig
from megatron_salt.errors import UserError
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.salt import load_teacher
from megatron_salt.salt.load_teacher import refuse_trainable
from megatron_salt.salt.teacher import Teacher
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, read_teacher, refuse_unfit
from tests.support.ranks import run_ranks
from tests.support.small import SEQ_LENGTH, Case, build_student
from tests.support.teaching import TEACHER, TIED_TEACHER, Lesson, admit, head_of, make_teacher

EVERYWHERE = (0, 1, 2, 3)
TP2PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("school")
    run_ranks(1, make_teacher, root / "untied", TEACHER, 30)
    run_ranks(1, make_teacher, root / "tied", TIED_TEACHER, 30)
    return root


# ---- the weights arrived -----------------------------------------------------------------------------------------------


def zeroed(teacher: Teacher) -> None:
    for parameter in body(teacher).parameters():
        parameter.zero_()


def random(teacher: Teacher) -> None:
    for parameter in body(teacher).parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)


def half_loaded(teacher: Teacher) -> None:
    """Damage: the second layer was not loaded."""
    for name, parameter in body(teacher).named_parameters():
        if name.startswith("decoder.layers.1.") and parameter.dim() > 1:
            parameter.normal_(std=0.02)


def of_another_vocabulary(teacher: Teacher) -> None:
    """Damage: the output weight is shifted by one id."""
    if teacher.weight is not None:
        teacher.weight.copy_(teacher.weight.roll(1, 0))


def headless(teacher: Teacher) -> None:
    if teacher.weight is not None:
        teacher.weight.zero_()


def untouched(teacher: Teacher) -> None:
    pass


def body(teacher: Teacher) -> torch.nn.Module:
    return teacher.body


def gate(lesson: Lesson, world_size: int, damage: Callable[[Teacher], None], damaged_ranks: tuple[int, ...]) -> str | None:
    """The message of the verification for a teacher whose weights were damaged on some ranks; None where it passes."""
    student = build_student(lesson.case, world_size)
    teacher = admit(lesson, student)
    if student.mesh.rank in damaged_ranks:
        with torch.no_grad():
            damage(teacher)
    checkpoint = read_teacher(lesson.load)
    try:
        load_teacher.verify(teacher, checkpoint, head_of(student, lesson.case), lesson.case.dtype)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "damage, ranks, dtype",
    [
        (zeroed, EVERYWHERE, torch.float32),
        (random, EVERYWHERE, torch.float32),
        (half_loaded, EVERYWHERE, torch.float32),
        (headless, (2, 3), torch.float32),
        (of_another_vocabulary, (3,), torch.float32),
        (random, (1,), torch.float32),
        (zeroed, (2,), torch.float32),
        (zeroed, EVERYWHERE, torch.bfloat16),
        (random, EVERYWHERE, torch.bfloat16),
        (headless, (2, 3), torch.bfloat16),
        (zeroed, (2,), torch.bfloat16),
    ],
)
def test_the_gate_sees_weights_that_did_not_arrive(
    school: Path, damage: Any, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    """On any rank, and all ranks get the same message."""
    lesson = Lesson(Case(parallel=TP2PP2, dtype=dtype), str(school / "untied"))
    told = run_ranks(4, gate, lesson, 4, damage, ranks)
    assert len(set(told)) == 1 and told[0] is not None
    assert f"{school / 'untied'}" in told[0] and "when saved" in told[0] and "here" in told[0]


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_lets_the_right_ones_pass(school: Path, kind: str, dtype: torch.dtype) -> None:
    lesson = Lesson(Case(parallel=TP2PP2, dtype=dtype), str(school / kind), (2, 1))
    assert run_ranks(4, gate, lesson, 4, untouched, EVERYWHERE) == [None] * 4


# ---- it fits -----------------------------------------------------------------------------------------------------------

FITTING = TeacherCheckpoint(
    directory=Path("teachers/iter_0000100"),
    model=TEACHER,
    vocabulary_size=250,
    seq_length=64,
    tokenizer_fingerprint="tokenizer:aaaa",
    fingerprint="sha256:1",
    lengths=(16, 64),
    losses=(5.0, 5.0),
    dtype="float32",
    step=100,
)


@pytest.mark.parametrize(
    "change, salt, told",
    [
        (dict(seq_length=16, lengths=(16,)), {}, ["was trained on --seq-length 16, shorter than this run's --seq-length 32"]),
        (dict(seq_length=16, imported=True), {}, ["context is 16 tokens, shorter than this run's --seq-length 32"]),
        (
            {},
            dict(teacher_tensor_model_parallel_size=3),
            ["--num-attention-heads 4", "--teacher-tensor-model-parallel-size = 3"],
        ),
        ({}, dict(teacher_pipeline_model_parallel_size=4), ["--num-layers 2", "--teacher-pipeline-model-parallel-size"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_with_both_sides(change: dict, salt: dict, told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        refuse_unfit(replace(FITTING, **change), SaltConfig(teacher_load="teachers", kd_steps=1, **salt), 32)
    assert all(words in str(caught.value) for words in ["--teacher-load teachers/iter_0000100", *told])


def test_one_that_fits_is_not() -> None:
    refuse_unfit(
        FITTING,
        SaltConfig(teacher_load="teachers", kd_steps=1, teacher_tensor_model_parallel_size=2),
        32,
    )


def trainable(lesson: Lesson, what: str) -> str | None:
    student = build_student(lesson.case, 1)
    teacher = admit(lesson, student)
    optimized = [tensor for group in student.optimizer.param_groups for tensor in group["params"]]
    if what == "a gradient":
        next(body(teacher).parameters()).requires_grad_()
    if what == "the optimizer":
        optimized.append(teacher.weight)
    try:
        refuse_trainable(teacher, optimized)
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "what, told", [("nothing", None), ("a gradient", "requires a gradient"), ("the optimizer", "in the optimizer")]
)
def test_a_teacher_that_could_be_trained_is_our_mistake(school: Path, what: str, told: str | None) -> None:
    [said] = run_ranks(1, trainable, Lesson(Case(), str(school / "untied")), what)
    assert (said is None) if told is None else (told in said)


# ---- and knows nothing of the student's layout -------------------------------------------------------------------------

ALLOWED = {
    ("layers.py", "get_tensor_model_parallel_group"),  # of a frozen linear without sequence parallelism: not used
    # A dimension that only 0.19 knows and that is 1 here: weights are not rematerialised.
    ("process_groups_config.py", "get_expert_gtp_weight_remat_group"),
    ("process_groups_config.py", "get_gtp_weight_remat_group"),
}
"""(file, function of parallel_state) of the calls that may happen while a teacher of another layout is built and run."""


@contextmanager
def audited(asked: collections.Counter) -> Iterator[None]:
    """Count the calls that ask parallel_state for a group or a rank, by caller."""
    functions = {
        name: function for name, function in vars(parallel_state).items()
        if isinstance(function, types.FunctionType) and function.__module__ == parallel_state.__name__
        and name.startswith(("get_", "is_")) and name not in ("get_global_memory_buffer", "is_initialized")
    }  # fmt: skip
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron")]
    places = [
        (module, name, value) for module in modules for name, value in list(vars(module).items()) if value in functions.values()
    ]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_name == "get_tensor_model_parallel_group_if_none" or frame.f_globals is vars(parallel_state):
                assert frame.f_back is not None
                frame = frame.f_back
            asked[frame.f_code.co_filename.rpartition("/")[2], function.__name__] += 1
            return function(*arguments, **options)

        return ask

    for module, name, function in places:
        setattr(module, name, watched(function))
    yield
    for module, name, function in places:
        setattr(module, name, function)


def audit(lesson: Lesson, world_size: int) -> tuple[dict, dict]:
    """The callers while a teacher was loaded and run; and while the random state was seeded, which shows that the audit can fail."""
    student = build_student(lesson.case, world_size)
    by_teacher: collections.Counter = collections.Counter()
    with audited(by_teacher):
        teacher = admit(lesson, student)
        teacher.hidden_states(load_teacher.fixed_batch(250, SEQ_LENGTH, [16, 32]), merge=1)
    by_all: collections.Counter = collections.Counter()
    with audited(by_all):
        seed_everything(1, student.mesh)
    return dict(by_teacher), dict(by_all)


def test_the_teacher_does_not_ask_for_the_students_groups(school: Path) -> None:
    lesson = Lesson(
        Case(parallel=ParallelConfig(tensor_model_parallel_size=4), model=replace(TEACHER, num_query_groups=4)),
        str(school / "untied"),
        (1, 2),
    )
    for by_teacher, by_all in run_ranks(4, audit, lesson, 4):
        assert set(by_teacher) <= ALLOWED
        assert set(by_all) - ALLOWED
