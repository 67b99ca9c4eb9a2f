"""The cost of stage 1 and of scoring: cases by hand, and laws for any pair of models and layouts."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_salt import yaml_core
from megatron_salt.cards import Rates, reached
from megatron_salt.config import LoggingConfig, ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.flops import core_attention_flops, flops_per_token, head_flops, layer_flops
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt import routing
from megatron_salt.salt.cost import BY_FLOPS, ModelRates, Prediction, predict, rates_of_gpu, scoring_flops, scoring_line
from megatron_salt.salt.device_rates import LayerShape, find_rates, measure
from megatron_salt.salt.head_cost import HeadShape, head_seconds, pass_bytes
from megatron_salt.salt.layer_cost import embedding_bytes, layer_seconds, update_bytes
from tests.support.selections import manifest_of

STUDENT = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4)
TEACHER = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
VOCABULARY, LENGTH = 1024, 128

S, T = (LENGTH * layer_flops(model, LENGTH) for model in (STUDENT, TEACHER))  # of a microbatch of one sample
S_HEAD, T_HEAD = (LENGTH * head_flops(model, VOCABULARY) for model in (STUDENT, TEACHER))
RATES = ModelRates(
    layers=Rates(1e11, 1e10), head=Rates(9e10, 1e10), teacher_layers=Rates(7e10, 1e10), teacher_head=Rates(8e10, 1e10), source="a test"
)  # fmt: skip


def head_of(parallel: ParallelConfig, student: ModelConfig = STUDENT, teacher: ModelConfig = TEACHER) -> HeadShape:
    return HeadShape(
        rows=VOCABULARY // parallel.tensor_model_parallel_size, hidden=student.hidden_size, teacher_hidden=teacher.hidden_size,
        tokens=LENGTH // parallel.context_parallel_size, chunk_tokens=64, itemsize=4, kernels=False, tempered=True,
    )  # fmt: skip


def prediction(
    parallel: ParallelConfig = ParallelConfig(),
    *,
    student: ModelConfig = STUDENT,
    teacher: ModelConfig = TEACHER,
    tensor: int = 1,
    pipeline: int = 1,
    microbatches: int = 8,
    merge: int = 1,
    rates: ModelRates = BY_FLOPS,
) -> Prediction:
    return predict(
        student, parallel, teacher, teacher_tensor=tensor, teacher_pipeline=pipeline, num_microbatches=microbatches,
        microbatch_tokens=LENGTH, merge=merge, seq_length=LENGTH, head=head_of(parallel, student, teacher), fused_layers=False,
        rates=rates,
    )  # fmt: skip


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


def test_a_step_in_seconds_by_hand():
    """pp 2: the embedding's gradient in the first stage, the head in the last, which is the slower; then the optimizer."""
    parallel = pipeline_of(2)
    found, head = prediction(parallel, rates=RATES).times, head_of(parallel)
    layers = LENGTH * 4 * 3 * layer_seconds(STUDENT, LENGTH, 4, False, RATES.layers)
    update = update_bytes(STUDENT, parallel, [4, 4], VOCABULARY) / 1e10
    plain, taught = (head_seconds(head, RATES.head, rates) for rates in (None, RATES.teacher_head))
    assert plain > embedding_bytes(STUDENT, VOCABULARY, 4) / 1e10
    body = 4 * LENGTH * 4 * layer_seconds(TEACHER, LENGTH, 4, False, RATES.teacher_layers)
    assert found.body == pytest.approx(body)
    assert found.stage2 == pytest.approx(8 * (layers + plain) + update)
    assert found.stage1 == pytest.approx(body + 8 * (layers + taught) + update)


def test_in_seconds_the_passes_of_the_teachers_head_are_counted():
    """One rank: by time stage 1 costs more than by FLOPs, by what the passes over the logits move."""
    assert prediction(rates=RATES).ratio > prediction().ratio
    slow, fast = (replace(RATES, **{name: Rates(getattr(RATES, name).flops, moved) for name in
                  ("layers", "head", "teacher_layers", "teacher_head")}) for moved in (1e10, 1e16))  # fmt: skip
    more = [prediction(rates=rates).times for rates in (slow, fast)]
    extra = (more[0].stage1 - more[0].stage2 - more[0].body) - (more[1].stage1 - more[1].stage2 - more[1].body)
    head = head_of(ParallelConfig())
    assert extra == pytest.approx(8 * LENGTH * VOCABULARY * (pass_bytes(head, True) - pass_bytes(head, False)) / 1e10, rel=1e-3)


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


@pytest.mark.parametrize("rates", [BY_FLOPS, RATES], ids=["FLOPs", "seconds"])
def test_a_larger_teacher_costs_more(rates):
    for parallel, tensor, pipeline in cases():
        sizes = [prediction(parallel, teacher=replace(TEACHER, num_layers=layers, hidden_size=width), tensor=tensor, pipeline=pipeline,
                            rates=rates) for layers, width in [(2, 32), (4, 32), (4, 64)]]  # fmt: skip
        assert sizes[0].ratio < sizes[1].ratio < sizes[2].ratio


@pytest.mark.parametrize("recompute, again", [
    (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), 4 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3), 3 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=9), 4 * S),
    (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1, num_virtual_stages_per_pipeline_rank=2), 2 * S),
    (dict(recompute_granularity="selective"), 4 * LENGTH * core_attention_flops(STUDENT, LENGTH)),
])  # fmt: skip
def test_recomputation_takes_time_in_both_stages(recompute, again):
    plain, found = prediction(pipeline_of(2)).times, prediction(pipeline_of(2, **recompute)).times
    assert found.stage2 - plain.stage2 == pytest.approx(8 * again)
    assert found.stage1 - plain.stage1 == pytest.approx(8 * again)


def test_start_up_says_it_with_flag_and_numbers():
    large_head = replace(STUDENT, num_layers=8, hidden_size=16)
    found = prediction(pipeline_of(2), student=large_head)
    first, second = found.lines()
    assert "by FLOPs alone" in first
    by_time, *_ = prediction(pipeline_of(2), student=large_head, rates=RATES).lines()
    assert "by time (a test)" in by_time
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", first)]
    assert numbers[0] == pytest.approx(found.ratio, abs=1e-3) and sum(numbers[1:]) == pytest.approx(numbers[0] - 1, abs=2e-3)
    assert found.hint is not None
    assert f"--decoder-last-pipeline-num-layers {found.hint.layers} (now 4)" in second and "-" in second.split("stage 1 by")[1]
    assert len(prediction().lines()) == 1


# --- the rates of a device --------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def test_a_known_card_counts_by_its_peaks_in_the_format_of_each_product():
    found = rates_of_gpu(H100, LoggingConfig(), "fp8", "bf16", itemsize=2)
    bf16, fp8 = reached(989.5, 3350), reached(1979, 3350)
    assert (found.layers, found.teacher_layers, found.head, found.teacher_head) == (fp8, bf16, bf16, bf16)
    assert (
        found.known and H100 in found.source and "0.7 of 989.5 TFLOP/s in bf16" in found.source and "3350 GB/s" in found.source
    )
    assert rates_of_gpu(H100, LoggingConfig(), "fp32", "fp32", itemsize=4).head == reached(67, 3350)


def test_flags_go_before_the_table_and_tell_of_an_unknown_card():
    flags = LoggingConfig(device_peak_tflops=100.0, device_peak_gb_per_s=1000.0)
    for name in (H100, "Some GPU"):
        found = rates_of_gpu(name, flags, "bf16", "fp8", itemsize=2)
        assert (found.layers, found.teacher_layers) == (reached(100, 1000), reached(200, 1000))
    assert find_rates(flags, MLP, MLP, head_of(ParallelConfig())).head == reached(100, 1000)  # a CPU too


def test_one_flag_replaces_one_figure_of_a_measured_cpu():
    head = head_of(ParallelConfig())
    tflops = find_rates(LoggingConfig(device_peak_tflops=3.0), MLP, MLP, head)
    moved = find_rates(LoggingConfig(device_peak_gb_per_s=7.0), MLP, MLP, head)
    for name in ("layers", "head", "teacher_layers", "teacher_head"):
        assert getattr(tflops, name).flops == reached(3.0, 7.0).flops and getattr(tflops, name).bytes != reached(3.0, 7.0).bytes
        assert getattr(moved, name).bytes == reached(3.0, 7.0).bytes and getattr(moved, name).flops != reached(3.0, 7.0).flops
    assert "replaced by --device-peak-tflops" in tflops.source and "replaced by --device-peak-gb-per-s" in moved.source


@pytest.mark.parametrize("flags, missing", [
    (LoggingConfig(), "--device-peak-tflops and --device-peak-gb-per-s would"),
    (LoggingConfig(device_peak_tflops=1.0), "known; --device-peak-gb-per-s would"),
    (LoggingConfig(device_peak_gb_per_s=1.0), "known; --device-peak-tflops would"),
])  # fmt: skip
def test_an_unknown_card_is_told_and_never_guessed(flags, missing):
    found = rates_of_gpu("NVIDIA H100 something", flags, "bf16", "bf16", itemsize=2)
    assert not found.known and missing in found.source and "NVIDIA H100 something" in found.source
    assert replace(found, source="") == BY_FLOPS
    [line] = prediction(rates=found).lines()
    assert "by FLOPs alone" in line and missing in line


MLP = LayerShape(hidden=64, width=256, products="fp32")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_cpu_is_measured_without_drawing_a_random_number(itemsize):
    before = torch.get_rng_state()
    found = measure(MLP, MLP, replace(head_of(ParallelConfig()), itemsize=itemsize))
    assert torch.equal(before, torch.get_rng_state())
    for rates in (found.layers, found.head, found.teacher_layers, found.teacher_head):
        assert 1e6 < rates.flops < 1e14 and 1e6 < rates.bytes < 1e13
    assert "measured on this CPU" in found.source and found.known


def test_one_row_and_one_token_can_be_measured():
    one = replace(head_of(ParallelConfig()), rows=1, tokens=1, chunk_tokens=1, hidden=1, teacher_hidden=1)
    assert measure(LayerShape(hidden=1, width=1, products="fp32"), MLP, one).known


@pytest.mark.parametrize("products, told", [("bf16", "1.19x in bfloat16"), ("fp8", "1.21x in FP8")])
def test_what_the_pages_say_of_the_example_on_an_h100(products, told):
    """Kernels, Transformer Engine, the teacher's weight in place: examples/salt_2p8b.sh."""
    student, teacher = (
        ModelConfig(**yaml_core.load((ROOT / f"examples/model_{size}.yaml").read_text())["model"]) for size in ("2p8b", "1p5b")
    )
    head = HeadShape(
        rows=256000, hidden=student.hidden_size, teacher_hidden=teacher.hidden_size, tokens=4 * 1280, chunk_tokens=2048, itemsize=2,
        kernels=True, tempered=True,
    )  # fmt: skip
    found = predict(
        student, ParallelConfig(), teacher, teacher_tensor=1, teacher_pipeline=1, num_microbatches=64, microbatch_tokens=4 * 1280,
        merge=2, seq_length=1280, head=head, fused_layers=True, rates=rates_of_gpu(H100, LoggingConfig(), products, products, 2),
    )  # fmt: skip
    assert f"{found.ratio:.2f}x" == told.split()[0]
    assert told in (ROOT / "docs/performance.md").read_text()


# --- the scores of a selection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample, sample_seed, part", [(None, None, 1.0), (0.35, 1, 0.35)])
def test_scoring_costs_a_forward_pass_of_the_teacher_for_each_window_that_is_scored(sample, sample_seed, part):
    scores = manifest_of([600, 400], vocabulary=1000, seq_length=LENGTH, sample=sample, sample_seed=sample_seed)
    padded = TEACHER.padded_vocabulary_size(1000)
    flops = scoring_flops(scores, TEACHER)
    assert flops == pytest.approx(part * 1000 * (4 * T + LENGTH * head_flops(TEACHER, padded)))
    assert f"{flops:.3g} FLOPs, 25.0% of the {4 * flops:.3g} that this run takes" in scoring_line(flops, 4 * flops)
