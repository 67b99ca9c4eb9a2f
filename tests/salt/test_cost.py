"""The cost of stage 1 and of scoring: cases by hand, and laws for any pair of models and layouts."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.flops import HeadCost, core_attention_flops, flops_per_token, head_flops, layer_flops
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt import routing
from megatron_salt.salt.cost import Prediction, predict, scoring_flops, scoring_line
from tests.support.selections import manifest_of

STUDENT = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4)
TEACHER = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
VOCABULARY, LENGTH = 1024, 128

S, T = layer_flops(STUDENT, LENGTH), layer_flops(TEACHER, LENGTH)
S_HEAD, T_HEAD = head_flops(STUDENT, VOCABULARY), head_flops(TEACHER, VOCABULARY)
PRODUCTS_ALONE = HeadCost(0.0, 0.0)


def prediction(
    parallel: ParallelConfig = ParallelConfig(),
    *,
    student: ModelConfig = STUDENT,
    teacher: ModelConfig = TEACHER,
    tensor: int = 1,
    pipeline: int = 1,
    microbatches: int = 8,
    merge: int = 1,
    head: HeadCost = PRODUCTS_ALONE,
) -> Prediction:
    return predict(
        student,
        parallel,
        teacher,
        teacher_tensor=tensor,
        teacher_pipeline=pipeline,
        padded_vocabulary_size=VOCABULARY,
        num_microbatches=microbatches,
        merge=merge,
        seq_length=LENGTH,
        head=head,
    )


def pipeline_of(stages: int, tensor: int = 1, context: int = 1, **others: Any) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages, tensor_model_parallel_size=tensor, context_parallel_size=context, **others
    )


def cases() -> list[tuple[ParallelConfig, int, int]]:
    return [
        (parallel, tensor, pipeline)
        for stages, tp, cp, virtual in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)) if stages > 1 or virtual == 1
        for parallel in [pipeline_of(stages, tp, cp, num_virtual_stages_per_pipeline_rank=virtual)]
        for tensor, pipeline in itertools.product((1, 2, 4), (1, 2))
        if parallel.replica_ranks % (tensor * pipeline) == 0
    ]  # fmt: skip


def test_one_rank_pays_for_a_forward_pass_of_the_teacher():
    whole = flops_per_token(STUDENT, LENGTH, VOCABULARY)
    teacher = flops_per_token(TEACHER, LENGTH, VOCABULARY) / 3
    assert prediction().ratio == pytest.approx(1 + teacher / whole)
    assert prediction().hint is None


def test_body_shared_and_head_on_the_last_stage():
    """pp 2: four layers a stage. Each of two teacher replicas runs half of the microbatches."""
    found = prediction(pipeline_of(2))
    last = 4 * 3 * S + 3 * S_HEAD
    assert found.times.stage2 == pytest.approx(8 * last)
    assert found.times.body == pytest.approx(4 * 4 * T)
    assert found.times.stage1 == pytest.approx(4 * 4 * T + 8 * (last + T_HEAD))


def test_the_heads_other_work_is_the_last_stages_and_a_teacher_adds_to_it():
    """pp 2 and tp 2: 256 ids a rank for each of 8 microbatches."""
    found, plain = (prediction(pipeline_of(2, tensor=2), head=head).times for head in (HeadCost(30.0, 110.0), PRODUCTS_ALONE))
    assert found.stage2 - plain.stage2 == pytest.approx(8 * 30 * VOCABULARY / 2)
    assert found.stage1 - plain.stage1 == pytest.approx(8 * 110 * VOCABULARY / 2)
    assert found.body == plain.body


def test_a_short_last_stage_hides_the_teachers_head():
    found = prediction(pipeline_of(2, decoder_last_pipeline_num_layers=1))
    assert found.times.stage2 == pytest.approx(8 * 7 * 3 * S) and 3 * S + 3 * S_HEAD + T_HEAD < 7 * 3 * S
    assert found.times.stage1 == pytest.approx(found.times.stage2 + found.times.body)


@pytest.mark.parametrize(
    "microbatches, merge, busiest", [(8, 1, 2), (9, 1, 3), (3, 1, 1), (8, 2, 2), (7, 2, 2), (9, 2, 3), (2, 4, 2)]
)
def test_the_body_takes_as_long_as_its_busiest_replica(microbatches, merge, busiest):
    """Four replicas over tp 2 x pp 2."""
    parallel = pipeline_of(2, tensor=2)
    assert prediction(parallel, microbatches=microbatches, merge=merge).times.body == pytest.approx(busiest * 4 * T)
    student = Layout(tensor=2, pipeline=2)
    plan = routing.plan_exchange(student, routing.teacher_layout(student, 1, 1), microbatches, merge, LENGTH)
    loads = [sum(len(plan.microbatches_of(forward)) for forward in plan.forwards_of(replica)) for replica in range(4)]
    assert max(loads) == busiest


def test_where_replicas_come_out_even_the_teachers_layout_does_not_matter():
    parallel = pipeline_of(2, tensor=2)
    ratios = [
        prediction(parallel, tensor=tensor, pipeline=pipeline).ratio
        for tensor, pipeline in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
    ]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_stage_1_never_costs_less_and_a_hint_is_strictly_better_and_the_best():
    hints = 0
    for (parallel, tensor, pipeline), layers, microbatches in itertools.product(cases(), (8, 16), (1, 3, 8)):
        student = replace(STUDENT, num_layers=layers)
        arguments = dict(student=student, tensor=tensor, pipeline=pipeline, microbatches=microbatches)
        found = prediction(parallel, **arguments)
        assert found.ratio > 1
        others = []
        for last in range(1, layers):
            try:
                others.append(prediction(replace(parallel, decoder_last_pipeline_num_layers=last), **arguments))
            except UserError:
                continue
        best = min([found, *others], key=lambda one: one.times.stage1)
        if found.hint is None:
            assert best.times.stage1 == found.times.stage1
            continue
        hints += 1
        assert found.hint.times.stage1 == best.times.stage1 < found.times.stage1
        hinted = replace(parallel, decoder_last_pipeline_num_layers=found.hint.layers)
        assert layers_per_stage(student, hinted)[-1] == found.hint.layers != found.last_stage_layers
        assert prediction(hinted, **arguments).hint is None
    assert hints > 10


def test_a_larger_teacher_costs_more():
    for parallel, tensor, pipeline in cases():
        sizes = [prediction(parallel, teacher=replace(TEACHER, num_layers=layers, hidden_size=width), tensor=tensor, pipeline=pipeline)
                 for layers, width in [(2, 32), (4, 32), (4, 64)]]  # fmt: skip
        assert sizes[0].ratio < sizes[1].ratio < sizes[2].ratio


@pytest.mark.parametrize("recompute, again", [
    (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), 4 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3), 3 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=9), 4 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1, num_virtual_stages_per_pipeline_rank=2), 2 * S),
    (dict(recompute_granularity="selective"), 4 * core_attention_flops(STUDENT, LENGTH)),
])  # fmt: skip
def test_recomputation_takes_time_in_both_stages(recompute, again):
    plain, found = prediction(pipeline_of(2)).times, prediction(pipeline_of(2, **recompute)).times
    assert found.stage2 - plain.stage2 == pytest.approx(8 * again)
    assert found.stage1 - plain.stage1 == pytest.approx(8 * again)


def test_start_up_says_it_with_flag_and_numbers():
    large_head = replace(STUDENT, num_layers=8, hidden_size=16)
    found = prediction(pipeline_of(2), student=large_head)
    first, second = found.lines()
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", first)]
    assert numbers[0] == pytest.approx(found.ratio, abs=1e-3) and sum(numbers[1:]) == pytest.approx(numbers[0] - 1, abs=2e-3)
    assert found.hint is not None
    assert f"--decoder-last-pipeline-num-layers {found.hint.layers} (now 4)" in second and "-" in second.split("stage 1 by")[1]
    assert len(prediction().lines()) == 1


@pytest.mark.parametrize("sample, sample_seed, part", [(None, None, 1.0), (0.35, 1, 0.35)])
def test_scoring_costs_a_forward_pass_of_the_teacher_for_each_window_that_is_scored(sample, sample_seed, part):
    scores = manifest_of([600, 400], vocabulary=1000, seq_length=LENGTH, sample=sample, sample_seed=sample_seed)
    padded = TEACHER.padded_vocabulary_size(1000)
    flops = scoring_flops(scores, TEACHER)
    assert flops == pytest.approx(part * 1000 * LENGTH * (4 * T + head_flops(TEACHER, padded)))
    assert f"{flops:.3g} FLOPs, 25.0% of the {4 * flops:.3g} that this run takes" in scoring_line(flops, 4 * flops)
