"""Layouts are Megatron's: coordinates are a bijection, and groups are those of megatron-core's RankGenerator."""

from __future__ import annotations

import itertools

import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.parallel_state import RankGenerator

from megatron_salt.config import ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Coordinates, Layout, context_slice, student_layout, world_size_from_environment

LAYOUTS = [Layout(*sizes) for sizes in itertools.product((1, 2, 3, 4), repeat=4) if sizes.count(1) <= 2] + [
    Layout(), Layout(tensor=8), Layout(context=2), Layout(data=5), Layout(pipeline=4), Layout(8, 4, 16, 8),
]  # fmt: skip
DIMENSIONS = ("tp", "cp", "dp", "pp")


def size(layout: Layout, *dimensions: str) -> int:
    sizes = dict(tp=layout.tensor, cp=layout.context, dp=layout.data, pp=layout.pipeline)
    product = 1
    for dimension in dimensions:
        product *= sizes[dimension]
    return product


def test_every_place_has_one_rank():
    for layout in LAYOUTS:
        places = [layout.coordinates(rank) for rank in range(layout.world_size)]
        assert [layout.rank(place) for place in places] == list(range(layout.world_size))
        assert set(places) == {
            Coordinates(*place) for place in itertools.product(*(range(size(layout, dimension)) for dimension in DIMENSIONS))
        }


def test_tp_is_fastest_and_pp_slowest():
    """So that tensor parallelism stays inside a node."""
    layout = Layout(tensor=2, context=3, data=5, pipeline=7)
    assert layout.coordinates(1) == Coordinates(tp=1, cp=0, dp=0, pp=0)
    assert layout.coordinates(2) == Coordinates(tp=0, cp=1, dp=0, pp=0)
    assert layout.coordinates(6) == Coordinates(tp=0, cp=0, dp=1, pp=0)
    assert layout.coordinates(30) == Coordinates(tp=0, cp=0, dp=0, pp=1)


def test_groups_are_megatrons():
    for layout in LAYOUTS:
        sizes = dict(tp=layout.tensor, cp=layout.context, dp=layout.data, pp=layout.pipeline)
        generator = RankGenerator(**sizes, ep=1, order="tp-cp-ep-dp-pp")
        for varying in itertools.chain(*(itertools.combinations(DIMENSIONS, count) for count in (1, 2, 3, 4))):
            groups = layout.groups(*varying)
            assert groups == sorted(generator.get_ranks("-".join(varying))), (layout, varying)
            assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
            assert {len(group) for group in groups} == {size(layout, *varying)}


def test_a_replica_is_all_but_data_parallelism():
    layout = Layout(tensor=2, context=2, data=3, pipeline=2)
    for rank in range(layout.world_size):
        replica = layout.replica(rank)
        assert rank in replica and len(replica) == 8
        assert {layout.coordinates(other).dp for other in replica} == {layout.coordinates(rank).dp}


def test_what_is_left_over_is_data_parallelism():
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2)
    assert student_layout(parallel, 36) == Layout(tensor=2, context=2, data=3, pipeline=3)
    assert student_layout(ParallelConfig(), 1) == Layout()


@pytest.mark.parametrize("world_size", [1, 6, 18])
def test_ranks_that_do_not_make_whole_replicas_are_refused(world_size):
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2)
    with pytest.raises(UserError) as refused:
        student_layout(parallel, world_size)
    assert str(refused.value) == (
        f"{world_size} ranks cannot hold whole replicas of --tensor-model-parallel-size 2 "
        "x --pipeline-model-parallel-size 3 x --context-parallel-size 2 = 12 ranks; start a multiple of 12"
    )


@pytest.mark.parametrize("context", [1, 2, 3, 4])
def test_context_slices_cover_a_sequence_once_and_carry_equal_causal_work(context):
    """The work of a position: the number of keys that it attends to."""
    length = 24 * context
    shares = [
        [position for part in context_slice(length, context, rank) for position in range(length)[part]]
        for rank in range(context)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(length))
    assert len({sum(share) for share in shares}) == 1
    assert all(share == sorted(share) for share in shares)


def test_the_launcher_tells_how_many_ranks_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert world_size_from_environment() == 12
    monkeypatch.delenv("WORLD_SIZE")
    assert world_size_from_environment() == 1
