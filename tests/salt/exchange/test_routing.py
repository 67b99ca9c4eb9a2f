"""Where the teacher lies over the student's ranks, and the plan of the exchange: laws over hundreds of layouts, in one process."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.parallel_state import RankGenerator

from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Coordinates, Layout, context_slice
from megatron_salt.salt import routing

STUDENTS = [
    Layout(*sizes) for sizes in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3), (1, 2, 4)) if math.prod(sizes) <= 48
]
PAIRS = [
    (student, tensor, pipeline)
    for student in STUDENTS for tensor, pipeline in itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4))
    if student.world_size // student.data % (tensor * pipeline) == 0
]  # fmt: skip
LAYOUTS = [(student, routing.teacher_layout(student, tensor, pipeline)) for student, tensor, pipeline in PAIRS]


def length_for(student: Layout) -> int:
    """A sequence length that can be cut. Where possible, a slice has positions of both chunks of a context-parallel rank."""
    return 2 * student.context * student.tensor * 3


def plans(num_microbatches: int, merge: int = 1, layouts: list[tuple[Layout, Layout]] = LAYOUTS):
    for student, teacher in layouts:
        yield student, teacher, routing.plan_exchange(student, teacher, num_microbatches, merge, length_for(student))


def positions(piece: routing.Piece) -> list[int]:
    return [position for part in piece.positions for position in range(part.start, part.stop)]


def test_there_are_hundreds_of_layouts():
    assert len(LAYOUTS) > 400 and len(set(LAYOUTS)) == len(LAYOUTS)


def test_a_teacher_is_replicas_inside_blocks():
    """The oracle: coordinates (replica, pp, tp), tp fastest, over the places of each block. dp numbers the replicas of all blocks."""
    for student, teacher in LAYOUTS:
        replicas = teacher.data // student.data
        for number, block in enumerate(student.groups("tp", "cp", "pp")):
            for place, rank in enumerate(block):
                rest, tp = divmod(place, teacher.tensor)
                replica, pp = divmod(rest, teacher.pipeline)
                assert teacher.coordinates(rank) == Coordinates(tp, 0, number * replicas + replica, pp)
            assert set(teacher.replica(block[0])) <= set(block) == set(student.replica(block[0]))


def test_groups_are_megatrons_applied_to_each_block():
    """The oracle: megatron-core's own rank generator over the places of a block, with the replica as its slowest dimension, dp."""
    for student, teacher in LAYOUTS:
        replicas = teacher.data // student.data
        generator = RankGenerator(tp=teacher.tensor, cp=1, ep=1, pp=teacher.pipeline, dp=replicas, order="tp-pp-cp-ep-dp")
        blocks = student.groups("tp", "cp", "pp")
        for kind in ("tp", "pp", "tp-pp"):
            expected = [[block[place] for place in places] for block in blocks for places in generator.get_ranks(kind)]
            assert sorted(teacher.groups(*kind.split("-"))) == sorted(expected), (student, teacher, kind)


def test_each_microbatch_is_computed_once_and_loads_differ_by_at_most_one():
    for num_microbatches, merge in [(1, 1), (2, 1), (5, 1), (8, 1), (8, 3), (7, 2), (3, 4), (24, 1)]:
        for *_, plan in plans(num_microbatches, merge, LAYOUTS[:: 1 + num_microbatches // 4]):
            forwards = [plan.forwards_of(replica) for replica in range(plan.num_replicas)]
            computed = [m for forward in itertools.chain(*forwards) for m in plan.microbatches_of(forward)]
            assert sorted(computed) == list(range(num_microbatches))
            loads = [len(numbers) for numbers in forwards]
            assert max(loads) - min(loads) <= 1 and max(loads) == -(-plan.num_forwards // plan.num_replicas)
            assert all(len(plan.microbatches_of(forward)) == merge for forward in range(plan.num_forwards - 1))


def test_sends_match_receives():
    for student, _, plan in plans(5, merge=2):
        places = range(student.world_size // student.data)
        sends = np.array([plan.send_sizes(place) for place in places])
        receives = np.array([plan.receive_sizes(place) for place in places])
        assert (sends == receives.T).all() and sends.shape == (len(places), len(places))
        assert sends.sum() == 5 * length_for(student)


def test_the_last_stage_has_each_position_of_each_microbatch_exactly_once():
    for student, _, plan in plans(3):
        held = Counter((piece.microbatch, position) for piece in plan.pieces for position in positions(piece))
        assert held == Counter(itertools.product(range(3), range(length_for(student))))


def test_a_rank_receives_its_share_of_what_its_context_rank_holds():
    """The oracle: the student's zigzag positions, cut by numpy."""
    for student, _, plan in plans(3):
        [block, *_] = student.groups("tp", "cp", "pp")
        for place, rank in enumerate(block):
            at, pieces = student.coordinates(rank), plan.received_by(place)
            if at.pp < student.pipeline - 1:
                assert pieces == [] and sum(plan.receive_sizes(place)) == 0
                continue
            chunks = [
                np.arange(length_for(student))[part] for part in context_slice(length_for(student), student.context, at.cp)
            ]
            expected = np.split(np.concatenate(chunks), student.tensor)[at.tp].tolist()
            assert sorted(piece.microbatch for piece in pieces) == [0, 1, 2]
            assert all(positions(piece) == expected and len(expected) == plan.piece_length for piece in pieces)


def test_a_guided_stage_takes_what_the_last_stage_would_and_a_stage_that_is_both_takes_it_once():
    """The oracle: the plan for the last stage alone, with its targets moved by whole stages of tp x cp places."""
    for student, teacher in LAYOUTS[::5]:
        last, places, length = student.pipeline - 1, student.tensor * student.context, length_for(student)
        alone = routing.plan_exchange(student, teacher, 3, 2, length)
        some_stages = {frozenset({stage, *more}) for stage in range(student.pipeline) for more in ((), (last,))}
        for some in some_stages:
            plan = routing.plan_exchange(student, teacher, 3, 2, length, some)
            moved = [replace(piece, target=piece.target - (last - stage) * places) for stage in some for piece in alone.pieces]
            assert list(plan.pieces) == sorted(moved, key=lambda piece: (piece.source, piece.target, piece.microbatch))
            sends = np.array([plan.send_sizes(place) for place in range(plan.num_places)])
            assert (sends == np.array([plan.receive_sizes(place) for place in range(plan.num_places)]).T).all()
            assert sends.sum() == 3 * len(some) * length


def test_who_sends_has_it():
    """The last stage of the replica that ran a microbatch sends its pieces."""
    for student, teacher, plan in plans(7, merge=2):
        [block, *_] = student.groups("tp", "cp", "pp")
        for piece in plan.pieces:
            at = teacher.coordinates(block[piece.source])
            assert at.pp == teacher.pipeline - 1
            assert any(piece.microbatch in plan.microbatches_of(forward) for forward in plan.forwards_of(at.dp))


def test_the_teachers_tensor_parallel_ranks_take_turns_in_sending():
    for student, teacher, plan in plans(1):
        senders = Counter(piece.source for piece in plan.pieces)
        ranks = student.tensor * student.context
        assert len(senders) == min(ranks, teacher.tensor)
        assert max(senders.values()) == -(-ranks // teacher.tensor)


def test_buffers_are_in_the_order_of_their_split_sizes():
    """Carry out a plan by hand: fill the send buffers piece by piece, exchange by split sizes, read the receive buffers piece by piece."""
    for student, _, plan in plans(4, layouts=LAYOUTS[::7]):
        places = range(student.world_size // student.data)
        outboxes = [[(p.microbatch, x) for p in plan.sent_by(place) for x in positions(p)] for place in places]
        inboxes: list[list[tuple[int, int]]] = [[] for _ in places]
        for outbox, place in zip(outboxes, places, strict=True):
            rest = iter(outbox)
            for target, size in enumerate(plan.send_sizes(place)):
                inboxes[target] += itertools.islice(rest, size)
            assert next(rest, None) is None
        assert inboxes == [[(p.microbatch, x) for p in plan.received_by(place) for x in positions(p)] for place in places]


def test_a_plan_by_hand():
    """tp 2, cp 2, pp 2: places 4 to 7 are the last stage; teacher 2 x 1: replicas on places (0, 1), (2, 3), (4, 5), (6, 7)."""
    student = Layout(tensor=2, context=2, pipeline=2)
    plan = routing.plan_exchange(student, routing.teacher_layout(student, 2, 1), num_microbatches=2, merge=1, seq_length=16)
    first, second = [slice(0, 4)], [slice(12, 16)]  # cp rank 0 holds chunks 0 and 3 of 4, cp rank 1 the two in the middle
    third, fourth = [slice(4, 8)], [slice(8, 12)]
    assert [(piece.microbatch, piece.source, piece.target, list(piece.positions)) for piece in plan.pieces] == [
        (0, 0, 4, first), (0, 0, 6, third), (0, 1, 5, second), (0, 1, 7, fourth),
        (1, 2, 4, first), (1, 2, 6, third), (1, 3, 5, second), (1, 3, 7, fourth),
    ]  # fmt: skip
    assert plan.send_sizes(0) == [0, 0, 0, 0, 4, 0, 4, 0] and plan.receive_sizes(5) == [0, 4, 0, 4, 0, 0, 0, 0]


def test_a_slice_may_straddle_the_two_chunks_of_a_context_rank():
    student = Layout(tensor=3, context=2)
    plan = routing.plan_exchange(student, routing.teacher_layout(student, 1, 1), num_microbatches=1, merge=1, seq_length=12)
    assert [piece.positions for piece in plan.pieces] == [
        (slice(0, 2),), (slice(2, 3), slice(9, 10)), (slice(10, 12),), (slice(3, 5),), (slice(5, 6), slice(6, 7)), (slice(7, 9),),
    ]  # fmt: skip


def test_a_guided_plan_by_hand():
    """tp 2, pp 3: places 0 and 1 are the first stage, 2 and 3 the second, 4 and 5 the last. Teacher 1 x 1: the first replica on place 0."""
    student = Layout(tensor=2, pipeline=3)
    teacher = routing.teacher_layout(student, 1, 1)
    first, second = (slice(0, 4),), (slice(4, 8),)
    for stages, expected in [
        ({1}, [(0, 2, first), (0, 3, second)]),
        ({1, 2}, [(0, 2, first), (0, 3, second), (0, 4, first), (0, 5, second)]),
        ({2}, [(0, 4, first), (0, 5, second)]),
        (None, [(0, 4, first), (0, 5, second)]),
    ]:
        plan = routing.plan_exchange(student, teacher, 1, 1, 8, None if stages is None else frozenset(stages))
        assert [(piece.source, piece.target, piece.positions) for piece in plan.pieces] == expected


@pytest.mark.parametrize("student, tensor, pipeline", [
    (Layout(tensor=2, pipeline=2), 3, 1), (Layout(data=4), 2, 1), (Layout(tensor=4), 2, 4), (Layout(context=2, pipeline=3), 2, 2),
])  # fmt: skip
def test_a_teacher_that_does_not_divide_the_block_is_refused(student, tensor, pipeline):
    with pytest.raises(UserError) as refused:
        routing.teacher_layout(student, tensor, pipeline)
    assert str(refused.value) == (
        f"--teacher-tensor-model-parallel-size {tensor} x --teacher-pipeline-model-parallel-size {pipeline} = {tensor * pipeline} "
        f"does not divide the {student.world_size // student.data} ranks of a student replica (--tensor-model-parallel-size "
        f"{student.tensor} x --context-parallel-size {student.context} x --pipeline-model-parallel-size {student.pipeline})"
    )


def test_every_pair_is_either_a_layout_or_refused():
    for student, tensor, pipeline in itertools.product(STUDENTS, (1, 2, 3, 4, 5), (1, 2, 3)):
        if (student, tensor, pipeline) not in PAIRS and student.world_size // student.data % (tensor * pipeline):
            with pytest.raises(UserError, match="does not divide"):
                routing.teacher_layout(student, tensor, pipeline)


def test_a_sequence_that_cannot_be_cut_is_refused():
    student = Layout(tensor=4, context=2)
    with pytest.raises(UserError, match=r"--seq-length 36 is not divisible by .*--tensor-model-parallel-size .* = 8$"):
        routing.plan_exchange(student, routing.teacher_layout(student, 1, 1), 1, 1, seq_length=36)


def test_idle_replicas_are_told():
    student = Layout(tensor=2, pipeline=2)
    teacher = routing.teacher_layout(student, 1, 1)
    assert routing.layout_warnings(student, teacher, 8) == []
    [told] = routing.layout_warnings(student, teacher, 6)
    assert "6 teacher forwards" in told and "4 teacher replicas" in told
    assert routing.layout_warnings(student, routing.teacher_layout(student, 2, 2), 5) == []


def test_a_torn_tensor_parallel_group_is_told_by_its_ranks():
    """tp 2, dp 2, pp 2: blocks (0, 1, 4, 5) and (2, 3, 6, 7). A teacher of tp 4 joins both stages of each."""
    student = Layout(tensor=2, data=2, pipeline=2)
    [told] = routing.layout_warnings(student, routing.teacher_layout(student, 4, 1), 2)
    assert "[0, 1, 4, 5]" in told and "1 more" in told and "--teacher-tensor-model-parallel-size 4" in told
    assert routing.layout_warnings(student, routing.teacher_layout(student, 2, 2), 2) == []
    wide = Layout(tensor=2, context=2, data=2)
    assert routing.layout_warnings(wide, routing.teacher_layout(wide, 4, 1), 2) == []


def test_the_fullest_place_of_the_exchange():
    """Oracle: what each place computed, sends and receives, while its buffers exist. `test_exchange.py` compares with tracked memory."""
    for _, _, plan in plans(6, merge=2):
        held = []
        for place in range(plan.num_places):
            computed = outbox = sum(len(positions(piece)) for piece in plan.sent_by(place))
            inbox = sum(len(positions(piece)) for piece in plan.received_by(place))
            held += [computed] if plan.num_places == 1 else [computed + outbox, outbox + inbox]
        assert plan.peak_positions == max(held)


def test_a_replica_on_one_rank_holds_the_hidden_states_once_and_a_pipeline_twice():
    """Six microbatches of 24 positions. With two stages each rank computes three, and the last stage receives six."""
    for student, expected in [(Layout(), 144), (Layout(pipeline=2), 72 + 144), (Layout(tensor=2), 72 + 72)]:
        teacher = routing.teacher_layout(student, 1, 1)
        assert routing.plan_exchange(student, teacher, 6, 1, 24).peak_positions == expected
