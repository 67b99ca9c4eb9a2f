"""A guided student learns in every layout, from a teacher of any other layout, what it learns on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.config import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, Case, make_weights
from tests.support.teaching import Lesson, Taught, make_teacher, teach

STEPS = 2
ALONE = Case(model=MODELS["untied"], adam_eps=1e-6)


def sizes(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, sp: bool = False, **flags: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp,
        context_parallel_size=cp, sequence_parallel=sp, **flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a student's initial weights."""
    root = tmp_path_factory.mktemp("school")
    run_ranks(1, make_teacher, root / "teacher")
    run_ranks(1, make_weights, ALONE, root / "weights")
    return root


def lesson(school: Path, **changes: Any) -> Lesson:
    """Layer 2 of 4 is guided, so strongly that the gradient norm tells."""
    return replace(Lesson(ALONE, str(school / "teacher"), guide="both", let_layer=2, let_weight=2.0), **changes)


@pytest.fixture(scope="module")
def serial(school: Path) -> dict[str, Taught]:
    """What one rank learns, by --guide."""
    return {
        guide: run_ranks(1, teach, lesson(school, guide=guide), 1, school / "weights", STEPS)[0]
        for guide in ("both", "hidden", "soft-labels")
    }


def test_guidance_changes_what_is_learnt(serial: dict[str, Taught]) -> None:
    both, soft = serial["both"], serial["soft-labels"]
    assert both.sums[0] == soft.sums[0] and both.grad_norms[0] != pytest.approx(soft.grad_norms[0], rel=1e-3)
    assert both.sums[1] != pytest.approx(soft.sums[1], rel=1e-4)


@pytest.mark.parametrize(
    "world_size, guide, parallel, teacher, merge",
    [
        pytest.param(4, "both", sizes(pp=2, vp=2), (2, 1), 1, id="both: dp2pp2vp2, teacher tp2"),
        pytest.param(4, "hidden", sizes(2, 2, sp=True), (1, 2), 2, id="hidden: tp2pp2 sp, teacher pp2 twice, merged"),
        pytest.param(4, "both", sizes(2, cp=2), (1, 2), 1, id="both: tp2cp2, teacher pp2 twice", marks=pytest.mark.long),
        pytest.param(4, "both", sizes(2, 2), (2, 2), 1, id="both: tp2pp2, teacher tp2pp2", marks=pytest.mark.full),
        pytest.param(4, "hidden", sizes(pp=4), (1, 1), 1, id="hidden: pp4, four teachers", marks=pytest.mark.full),
        pytest.param(4, "hidden", sizes(cp=2, use_distributed_optimizer=True), (2, 1), 1, id="hidden: dp2cp2, teacher tp2",
                     marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_layouts_of_student_and_teacher_do_not_matter(
    school: Path,
    serial: dict[str, Taught],
    world_size: int,
    guide: str,
    parallel: ParallelConfig,
    teacher: tuple[int, int],
    merge: int,
) -> None:
    case = replace(ALONE, parallel=parallel)
    found = lesson(school, case=case, guide=guide, teacher=teacher, merge=merge)
    for taught in run_ranks(world_size, teach, found, world_size, school / "weights", STEPS):
        assert taught.grad_norms == pytest.approx(serial[guide].grad_norms, rel=2e-5)
        for sums, expected in zip(taught.sums, serial[guide].sums, strict=True):
            assert sums == pytest.approx(expected, rel=2e-5, abs=1e-4)
