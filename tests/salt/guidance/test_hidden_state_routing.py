"""The teacher's last hidden states arrive with their microbatch on the stage of the guided layer, and nothing else is sent or computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_salt.config import ParallelConfig
from megatron_salt.model.flops import body_flops
from megatron_salt.model.guidance.target import Targets
from megatron_salt.parallel.layout import Coordinates, context_slice, student_layout
from megatron_salt.salt.guidance.layer_place import place_of_layer
from megatron_salt.salt.routing import plan_exchange, teacher_layout
from megatron_salt.salt.schedule import StepWeights
from tests.support.ranks import run_ranks
from tests.support.small import GLOBAL_BATCH, SEQ_LENGTH, SMALL, Case, batch, build_student
from tests.support.teaching import TEACHER, Lesson, admit, make_teacher

BOTH = StepWeights(soft_labels=0.5, hidden=0.1)
SOFT = StepWeights(soft_labels=0.5)
HIDDEN = StepWeights(hidden=0.1)


def parallel(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp,
        context_parallel_size=cp, sequence_parallel=sp,
    )  # fmt: skip


def attention_flops(query: Any, *arguments: Any, **options: Any) -> int:
    """Both products over the whole square. query: shape [b, heads, s, width]."""
    samples, heads, length, width = query
    return 4 * samples * heads * length * length * width


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""What torch's own counter leaves out on a CPU"""


@dataclass(frozen=True)
class Arrived:
    """What a rank's microbatch of one step carries."""

    sample_ids: list[int]
    soft: np.ndarray | None
    hidden: np.ndarray | None
    layer: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Seen:
    """One rank's part of the steps of a lesson."""

    at: Coordinates
    arrived: list[list[Arrived]]
    """[step][microbatch]"""
    sent: list[int]
    """Bytes that left the rank's memory in each step's all-to-all; the part for itself included"""
    flops: list[int]
    weight: tuple[int, ...] | None
    """Shape of the teacher's output weight here"""


def arrivals(lesson: Lesson, world_size: int, steps: list[StepWeights]) -> Seen:
    """Phases A and B of some steps, each of the same batch."""
    student = build_student(lesson.case, world_size)
    teacher, found, sent, flops = admit(lesson, student), [], [], []
    everything = dist.all_to_all_single
    for weights in steps:
        microbatches, passed = batch(student, lesson.case, 0), []

        def counted(inbox: Any, outbox: Any, *arguments: Any, passed: list[int] = passed, **options: Any) -> Any:
            passed.append(outbox.nbytes)
            return everything(inbox, outbox, *arguments, **options)

        with (
            mock.patch.object(dist, "all_to_all_single", counted),
            FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter,
        ):
            targets = teacher.annotate(microbatches, weights)
        found.append([arrived(one.sample_ids, target) for one, target in zip(microbatches, targets, strict=True)])
        sent.append(sum(passed))
        flops.append(counter.get_total_flops())
    shape = None if teacher.weight is None else tuple(teacher.weight.shape)
    return Seen(student.mesh.at, found, sent, flops, shape)


def arrived(ids: np.ndarray, target: Targets) -> Arrived:
    soft = None if target.soft is None else target.soft.hidden.numpy().copy()
    if target.hidden is None:
        return Arrived(ids.tolist(), soft, None)
    return Arrived(ids.tolist(), soft, target.hidden.hidden.numpy().copy(), target.hidden.layer, target.hidden.weight)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("teacher")
    run_ranks(1, make_teacher, root)
    return str(root)


@pytest.fixture(scope="module")
def oracle(teacher: str) -> np.ndarray:
    """Last hidden states [s, samples, h_t] of a teacher on one rank."""
    [seen] = run_ranks(1, arrivals, Lesson(Case(), teacher, guide="hidden"), 1, [HIDDEN])
    return np.concatenate([one.hidden for one in seen.arrived[0]], axis=1)


def check(seen: Seen, lesson: Lesson, world_size: int, steps: list[StepWeights], oracle: np.ndarray) -> None:
    """Each rank has its slice of the zigzag of its context-parallel rank, on the stages that the weights name, and on no others."""
    layout, place = (
        student_layout(lesson.case.parallel, world_size),
        place_of_layer(SMALL, lesson.case.parallel, lesson.let_layer),
    )
    zigzag = np.concatenate([np.arange(SEQ_LENGTH)[part] for part in context_slice(SEQ_LENGTH, layout.context, seen.at.cp)])
    own = np.split(zigzag, layout.tensor)[seen.at.tp]
    samples = GLOBAL_BATCH // layout.data
    for weights, of_step in zip(steps, seen.arrived, strict=True):
        assert [i for one in of_step for i in one.sample_ids] == list(range(samples * seen.at.dp, samples * (seen.at.dp + 1)))
        for one in of_step:
            expected = oracle[own][:, one.sample_ids]
            guided = weights.hidden is not None and seen.at.pp == place.stage
            taught = weights.soft_labels is not None and seen.at.pp == layout.pipeline - 1
            assert (one.hidden is not None, one.soft is not None) == (guided, taught)
            assert (one.layer, one.weight) == ((lesson.let_layer, weights.hidden) if guided else (None, None))
            for found in (one.hidden, one.soft):
                if found is not None:
                    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


LAYOUTS = [
    pytest.param(4, parallel(pp=2), 1, (2, 1), 2, 1, id="dp2pp2, layer 1, teacher tp2", marks=pytest.mark.full),
    pytest.param(4, parallel(cp=2, pp=2), 3, (1, 2), 2, 2, id="cp2pp2, layer 3 on the last stage, teacher pp2 twice, merged"),
    pytest.param(4, parallel(2, 2, sp=True), 2, (1, 1), 2, 1, id="tp2pp2 sp, layer 2, four teachers", marks=pytest.mark.full),
    pytest.param(4, parallel(2, 2), 1, (2, 2), 2, 1, id="tp2pp2, layer 1, teacher tp2pp2"),
    pytest.param(
        4, parallel(pp=2, vp=2), 2, (1, 2), 2, 1, id="dp2pp2vp2, layer 2 on the last stage's first chunk, teacher pp2"
    ),
    pytest.param(4, parallel(2, cp=2), 4, (2, 1), 4, 1, id="tp2cp2, layer 4, teacher tp2 twice", marks=pytest.mark.full),
]


@pytest.mark.parametrize("world_size, sizes, layer, teacher_sizes, micro_batch_size, merge", LAYOUTS)
def test_hidden_states_arrive_on_the_stage_of_the_guided_layer_and_what_is_sent_and_computed_is_what_was_planned(
    teacher: str, oracle: np.ndarray, world_size: int, sizes: ParallelConfig, layer: int, teacher_sizes: tuple[int, int],
    micro_batch_size: int, merge: int,
) -> None:  # fmt: skip
    """Oracles: a teacher on one rank; the plan's positions; and FLOPs of the layers, with the masked half of attention."""
    case = Case(sizes, micro_batch_size=micro_batch_size)
    lesson, steps = Lesson(case, teacher, teacher_sizes, merge, guide="both", let_layer=layer), [BOTH, HIDDEN, SOFT]
    ranks = run_ranks(world_size, arrivals, lesson, world_size, steps)
    for seen in ranks:
        check(seen, lesson, world_size, steps, oracle)
        assert (seen.weight is not None) == (seen.at.pp == sizes.pipeline_model_parallel_size - 1)
    layout = student_layout(sizes, world_size)
    taught = teacher_layout(layout, *teacher_sizes)
    stage, last = place_of_layer(SMALL, sizes, layer).stage, layout.pipeline - 1
    microbatches = GLOBAL_BATCH // layout.data // micro_batch_size
    position = micro_batch_size * TEACHER.hidden_size * 4
    for number, stages in enumerate([{stage, last}, {stage}, {last}]):
        plan = plan_exchange(layout, taught, microbatches, merge, SEQ_LENGTH, frozenset(stages))
        planned = [sum(plan.send_sizes(place)) * position for place in range(plan.num_places)]
        block = layout.groups("tp", "cp", "pp")[0]
        assert [ranks[rank].sent[number] for rank in block] == planned
        assert sum(planned) == len(stages) * microbatches * SEQ_LENGTH * position
    masked_half = TEACHER.num_layers * 2 * SEQ_LENGTH * TEACHER.head_width * TEACHER.num_attention_heads
    expected = GLOBAL_BATCH * SEQ_LENGTH * (body_flops(TEACHER, SEQ_LENGTH) + masked_half)
    for number in range(len(steps)):
        assert sum(seen.flops[number] for seen in ranks) == expected


def test_a_teacher_that_only_guides_has_no_output_weight(teacher: str, oracle: np.ndarray) -> None:
    lesson = Lesson(Case(parallel(pp=2)), teacher, (2, 1), guide="hidden", let_layer=2)
    for seen in run_ranks(2, arrivals, lesson, 2, [HIDDEN]):
        check(seen, lesson, 2, [HIDDEN], oracle)
        assert seen.weight is None


def frozen(lesson: Lesson, what: str) -> None:
    """Admit a teacher whose hidden states have no direction."""
    from megatron_salt.salt import load_teacher

    student, load = build_student(lesson.case, 1), load_teacher.load_body

    def spoiled(*arguments: Any) -> Any:
        body = load(*arguments)
        with torch.no_grad():
            body.decoder.final_layernorm.weight.fill_(float("nan") if what == "NaN" else 0.0)
        return body

    with mock.patch.object(load_teacher, "load_body", spoiled):
        admit(lesson, student)


@pytest.mark.parametrize("what", ["zero", "NaN"])
def test_hidden_states_without_a_direction_are_refused(teacher: str, what: str) -> None:
    with pytest.raises(
        Exception, match=rf"--teacher-load .* gives no direction to {SEQ_LENGTH} tokens of the fixed batch"
    ) as refused:
        run_ranks(1, frozen, Lesson(Case(), teacher, guide="hidden"), what)
    assert "zero or not finite" in str(refused.value)
