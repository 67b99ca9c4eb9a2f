"""The memory of a step, from invented traces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt.model.precision import Precision
from megatron_salt.planner.compose import compose
from megatron_salt.planner.memory import HostMemory
from tests.planner.runs import planned
from tests.planner.test_search import invented


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_whole_cache_leaves_the_teachers_output_weight_alone(pipeline):
    cold = planned(pipeline, (1, 1), pipeline_model_parallel_size=pipeline)
    warm = replace(cold, cached_share=1.0)
    assert cold.teacher is not None
    fp8 = Precision(implementation="transformer_engine", fp8_format="e4m3")
    traces, host = invented(cold.trace_task()), HostMemory(staged=0, gathered=0)
    output = cold.rows * cold.teacher.model.hidden_size * cold.itemsize
    for stage, (before, after) in enumerate(
        zip(compose(cold, traces, host).stages, compose(warm, traces, host).stages, strict=True)
    ):
        assert before.stage1 is not None and after.stage1 is not None
        assert (
            after.stage1.bytes["teacher weights"]
            == (output if stage == pipeline - 1 else 0)
            < before.stage1.bytes["teacher weights"]
        )
        assert not after.stage1.bytes["teacher activations"] and after.stage2 == before.stage2
    assert compose(replace(cold, cached_share=0.5), traces, host) == compose(cold, traces, host)
    assert replace(warm, teacher=replace(cold.teacher, precision=fp8)).loads_teacher_layers  # FP8 is checked with them
