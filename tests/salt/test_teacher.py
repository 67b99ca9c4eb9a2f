"""A student learns from a teacher of any layout what it learns on one rank, and a freed teacher leaves nothing behind."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint import rng
from megatron_salt.config import ParallelConfig
from megatron_salt.model.loss import KD_METRICS
from megatron_salt.parallel.layout import student_layout
from tests.support.grids import grid
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, Case, build_student, make_weights
from tests.support.teaching import TEACHER, TIED_TEACHER, Lesson, Taught, admit, lessons, make_teacher, teach

TEACHERS = {"untied": TEACHER, "tied": TIED_TEACHER}


def parallel(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, sp: bool = False, **flags: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp,
        context_parallel_size=cp, sequence_parallel=sp, **flags,
    )  # fmt: skip


OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
STUDENTS = {
    "tp2pp2": parallel(2, 2),
    "tp2pp2 sp": parallel(2, 2, sp=True),
    "pp4": parallel(pp=4),
    "tp4": parallel(4),
    "dp2tp2": parallel(2, **OVERLAP),
    "cp2": parallel(cp=2, use_distributed_optimizer=True),
    "vp2": parallel(pp=2, vp=2, **OVERLAP),
}
MORE_STUDENTS = {
    "cp2tp2 sp": parallel(2, cp=2, sp=True),
    "recompute": parallel(1, 2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def model_of(student: str, name: str) -> Any:
    """The student's model. tp 4 needs four query groups."""
    return replace(MODELS[name], num_query_groups=4) if student == "tp4" else MODELS[name]


def fits(student: str, teacher: tuple[int, int], **_: Any) -> bool:
    return STUDENTS[student].replica_ranks % (teacher[0] * teacher[1]) == 0


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of teachers and initial weights of students, each written by one rank."""
    root = tmp_path_factory.mktemp("school")
    for name, model in TEACHERS.items():
        run_ranks(1, make_teacher, root / name, model)
    return root


@pytest.fixture(scope="module")
def alone(school: Path) -> Any:
    """(initial weights, result of one rank) for a student's model, a teacher, and a way to cut the batch."""

    @cache
    def reference(student: str, model: str, teacher: str, micro_batch_size: int) -> tuple[Path, Taught]:
        case = Case(model=model_of(student, model), micro_batch_size=micro_batch_size, adam_eps=1e-6)
        weights = school / f"weights {student if student == 'tp4' else 'others'} {model}"
        if not weights.exists():
            run_ranks(1, make_weights, case, weights)
        return weights, run_ranks(1, teach, Lesson(case, str(school / teacher)), 1, weights)[0]

    return lambda student, *rest: reference("tp4" if student == "tp4" else "others", *rest)


def same(ours: Taught, reference: Taught) -> None:
    for sums, exact in zip(ours.sums, reference.sums, strict=True):
        got, wanted = dict(zip(KD_METRICS, sums, strict=True)), dict(zip(KD_METRICS, exact, strict=True))
        for name in ("accuracy", "teacher_accuracy", "agreement"):  # counts: one token may tip over
            assert abs(got.pop(name) - wanted.pop(name)) <= 1.5, name
        assert got == pytest.approx(wanted, rel=2e-6, abs=1e-4)
    assert ours.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


@pytest.mark.parametrize(
    "student, teacher, model, kind, micro_batch_size",
    grid(student=list(STUDENTS), teacher=[(1, 1), (2, 1), (1, 2), (2, 2)], model=["tied", "untied"], kind=["untied", "tied"],
         micro_batch_size=[2, 4], where=fits),
)  # fmt: skip
def test_layouts_of_student_and_teacher_do_not_matter(
    school: Path, alone: Any, student: str, teacher: tuple[int, int], model: str, kind: str, micro_batch_size: int
) -> None:
    """There are fewer, as many, or more microbatches than teacher replicas (4 or 8 over 1 to 4)."""
    weights, reference = alone(student, model, kind, micro_batch_size)
    case = Case(parallel=STUDENTS[student], model=model_of(student, model), micro_batch_size=micro_batch_size, adam_eps=1e-6)
    for taught in run_ranks(4, teach, Lesson(case, str(school / kind), teacher), 4, weights):
        same(taught, reference)


@pytest.mark.parametrize("student, teacher", [("cp2tp2 sp", (2, 2)), ("cp2tp2 sp", (1, 2)), ("recompute", (2, 1))])
def test_nor_do_context_and_sequence_parallelism_together_and_recomputation(
    school: Path, alone: Any, student: str, teacher: tuple[int, int]
) -> None:
    weights, reference = alone(student, "untied", "untied", 2)
    case = Case(parallel=MORE_STUDENTS[student], model=MODELS["untied"], adam_eps=1e-6)
    for taught in run_ranks(4, teach, Lesson(case, str(school / "untied"), teacher), 4, weights):
        same(taught, reference)


@pytest.mark.parametrize(
    "micro_batch_size, merge, student, teacher",
    [
        (16, 1, "pp4", (1, 1)),  # one microbatch for four replicas: three idle
        (4, 1, "pp4", (2, 2)),
        (8, 1, "pp4", (1, 2)),
        (2, 4, "tp2pp2", (1, 1)),
        (2, 2, "pp4", (1, 2)),
        (4, 2, "cp2", (2, 1)),
    ],
)
def test_how_the_batch_is_cut_does_not_matter(
    school: Path, alone: Any, micro_batch_size: int, merge: int, student: str, teacher: tuple[int, int]
) -> None:
    """Neither the student's micro-batch size nor the number of microbatches that the teacher merges matters. Replicas may be idle."""
    weights, reference = alone(student, "untied", "untied", 2)
    case = Case(parallel=STUDENTS[student], model=MODELS["untied"], micro_batch_size=micro_batch_size, adam_eps=1e-6)
    for taught in run_ranks(4, teach, Lesson(case, str(school / "untied"), teacher, merge), 4, weights):
        same(taught, reference)


def test_documents_hide_each_other_from_the_teacher_too(school: Path, alone: Any) -> None:
    weights, open_minded = alone("cp2", "untied", "untied", 2)
    case = Case(model=MODELS["untied"], documents=True, adam_eps=1e-6)
    reference = run_ranks(1, teach, Lesson(case, str(school / "untied")), 1, weights)[0]
    assert reference.sums[0][KD_METRICS.index("teacher_ce")] != pytest.approx(
        open_minded.sums[0][KD_METRICS.index("teacher_ce")], rel=1e-4
    )
    case = replace(case, parallel=STUDENTS["cp2"])
    same(run_ranks(4, teach, Lesson(case, str(school / "untied"), (2, 1)), 4, weights)[0], reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_its_teachers_weights_is_at_no_distance_from_it(tmp_path: Path, dtype: torch.dtype) -> None:
    run_ranks(1, make_teacher_with_seed, tmp_path, dtype)
    sums = run_ranks(1, teach_with_seed, tmp_path, dtype)[0]
    tokens, ce, kl, teacher_ce = (sums[KD_METRICS.index(name)] for name in ("tokens", "ce", "kl", "teacher_ce"))
    assert abs(kl / tokens) < 1e-6
    # In bfloat16 the student's logits are rounded to 8 bits, and the teacher's are not. A logit's error is at most 2^-9 of it, of either
    # sign, so the sum over some hundred tokens is nearer than 2^-13.
    assert ce == pytest.approx(teacher_ce, rel=1e-6 if dtype == torch.float32 else 2**-13)
    # Where n ids tie, which bfloat16 logits do in a few tokens of these, both models choose the same one in 1/n of cases.
    fewest = tokens if dtype == torch.float32 else 0.95 * tokens
    assert fewest <= sums[KD_METRICS.index("agreement")] <= tokens


def make_teacher_with_seed(directory: Path, dtype: torch.dtype) -> None:
    make_teacher(directory, MODELS["untied"], steps=0, dtype=dtype)


def teach_with_seed(directory: Path, dtype: torch.dtype) -> list[float]:
    lesson = Lesson(Case(model=MODELS["untied"], dtype=dtype), str(directory), temperature=1.0)
    student = build_student(lesson.case, 1, seed=77)  # the seed of make_teacher
    return lessons(student, admit(lesson, student), lesson, 1).sums[0]


def bits(tensors: Any) -> list[bytes]:
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def weightless(lesson: Lesson, world_size: int) -> tuple[Any, ...]:
    """Weights, random state, losses and gradient norms of a run with a teacher of weight 0, or without a teacher."""
    outcomes = []
    for with_teacher in (True, False):
        student = build_student(lesson.case, world_size, seed=5)
        teacher = admit(lesson, student) if with_teacher else None
        taught = lessons(student, teacher, lesson, 3)
        weights = bits(parameter for chunk in student.chunks for parameter in chunk.parameters())
        losses = [sums[:3] for sums in taught.sums]
        outcomes.append((weights, bits([rng.capture()[1]]), losses, taught.grad_norms))
        if with_teacher:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return tuple(outcomes)


@pytest.mark.parametrize(
    "student, teacher, dtype",
    [
        ("tp2pp2 sp", (2, 1), torch.float32),
        ("cp2", (1, 2), torch.float32),
        ("vp2", (1, 1), torch.bfloat16),
        ("dp2tp2", (2, 1), torch.bfloat16),
    ],
)
def test_a_teacher_of_weight_0_changes_no_bit(school: Path, student: str, teacher: tuple[int, int], dtype: torch.dtype) -> None:
    """Neither building, loading nor running it. The student has dropout, so that one more random number would show."""
    model = replace(MODELS["tied"], hidden_dropout=0.1, attention_dropout=0.1)
    lesson = Lesson(Case(parallel=STUDENTS[student], model=model, dtype=dtype), str(school / "untied"), teacher, kd_weight=0.0)
    for with_teacher, without in run_ranks(4, weightless, lesson, 4):
        assert with_teacher == without


def frozen(lesson: Lesson, world_size: int) -> bool:
    student = build_student(lesson.case, world_size)
    teacher = admit(lesson, student)
    own = [*teacher.body.parameters(), *teacher.body.buffers(), *([] if teacher.weight is None else [teacher.weight])]  # type: ignore[union-attr]
    before = bits(own)
    lessons(student, teacher, lesson, 3)
    return before == bits(own) and not any(tensor.requires_grad or tensor.grad is not None for tensor in own)


def test_the_teacher_is_bit_for_bit_what_it_was(school: Path) -> None:
    assert all(run_ranks(4, frozen, Lesson(Case(parallel=STUDENTS["tp2pp2"]), str(school / "tied"), (1, 2)), 4))


def gone(lesson: Lesson, world_size: int) -> tuple[list[str], Counter[str], int]:
    """(parts of a freed teacher that are alive, live tensors and bytes that were not there before it came, groups left over)."""
    earlier = live_tensors()  # what earlier tests left in this process stays until this one has counted
    student = build_student(lesson.case, world_size)
    lessons(student, None, lesson, 1)
    without = shapes(live_tensors())
    groups = len(dist.distributed_c10d._world.pg_map)
    teacher = admit(lesson, student)
    lessons(student, teacher, lesson, 1, start=1)
    assert num_bytes(live_tensors()) >= num_bytes(earlier) + teacher.num_bytes
    watched = [(type(thing).__name__, weakref.ref(thing)) for thing in parts(teacher)]
    teacher.free()
    alive = [name for name, reference in watched if reference() is not None]
    lessons(student, None, lesson, 1, start=2)  # stage 2, which fills the student's own caches again
    more = left_over(without)
    del earlier
    return alive, more, len(dist.distributed_c10d._world.pg_map) - groups


def left_over(before: Counter[str]) -> Counter[str]:
    """What is alive beyond `before`. gloo's thread frees what a collective sent a moment after it ended: that moment is waited for."""
    for _ in range(50):
        more = shapes(live_tensors()) - before
        if not more:
            break
        time.sleep(0.1)
    return more


def parts(teacher: Any) -> list[Any]:
    """Every tensor, module and process group of a teacher."""
    mesh = teacher.mesh
    groups = [mesh.groups.tp, mesh.groups.pp, mesh.groups.dp, mesh.groups.cp, teacher.block_group]
    tensors = [*teacher.body.parameters(), *teacher.body.buffers(), *([] if teacher.weight is None else [teacher.weight])]
    return [*tensors, *teacher.body.modules(), *groups, mesh]


def live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python can reach, except bytes of an all_gather_object, which gloo's thread frees later."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.dtype != torch.uint8]


def shapes(tensors: list[torch.Tensor]) -> Counter[str]:
    """How many tensors there are of each kind, and the bytes of their storages: a difference then shows its cause."""
    return Counter(f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors) + Counter(
        {"bytes": num_bytes(tensors)}
    )


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("student, teacher", [("tp2pp2 sp", (2, 1)), ("cp2", (1, 1)), ("vp2", (1, 2)), ("pp4", (2, 2))])
def test_nothing_of_a_freed_teacher_is_left(school: Path, student: str, teacher: tuple[int, int]) -> None:
    lesson = Lesson(Case(parallel=STUDENTS[student], micro_batch_size=4), str(school / "untied"), teacher)
    for alive, more, groups in run_ranks(4, gone, lesson, 4):
        assert alive == []
        assert not more
        assert groups == 0


def test_the_layouts_here_are_what_their_names_say() -> None:
    assert {name: student_layout(sizes, 4).data for name, sizes in (STUDENTS | MORE_STUDENTS).items()} == {
        "tp2pp2": 1, "tp2pp2 sp": 1, "pp4": 1, "tp4": 1, "dp2tp2": 2, "cp2": 2, "vp2": 2, "cp2tp2 sp": 1, "recompute": 2,
    }  # fmt: skip
