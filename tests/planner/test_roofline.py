"""Estimated times and bytes: each quantity by hand, for a small model and the 2.8B model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.cards import CARDS, Rates
from megatron_salt.cli import parse
from megatron_salt.errors import UserError
from megatron_salt.model.flops import head_flops
from megatron_salt.model.kernels.passes import NUM_SOFT_SUMS, NUM_SUMS
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.planner.planned_run import PlannedRun, PlannedTeacher
from megatron_salt.planner.time import traffic
from megatron_salt.planner.time.machine import NVLINK_GBS, Machine, MachineFlags, machine_of
from megatron_salt.planner.time.report import time_lines
from megatron_salt.planner.time.roofline import run_time, step_time
from megatron_salt.planner.time.traffic import student_transfers, teacher_transfers
from megatron_salt.planner.time.whole_run import evaluation_lines
from megatron_salt.salt.cost import ModelRates
from megatron_salt.train.plan import check
from tests.planner.runs import planned
from tests.support.small import VOCABULARY
from tests.support.teaching import TEACHER

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = "NVIDIA H100 80GB HBM3"
FLAGS = MachineFlags(gpu=H100, mfu=None, nvlink_gbs=None, network_gbs=None, gpus_per_node=8)
PLAIN = Rates(1e12, math.inf)
"""FLOPs alone, 10^12 a second"""
BY_FLOPS = Machine(
    rates=ModelRates(layers=PLAIN, head=PLAIN, teacher_layers=PLAIN, teacher_head=PLAIN, source="a test"),
    peak_flops=1e12, in_node=math.inf, between_nodes=math.inf, gpus_per_node=8, stated="a test",
)  # fmt: skip


def large(world: int, *words: str, teacher: bool = True) -> PlannedRun:
    """The 2.8B run of examples/, with the 1.5B teacher."""
    taught = ["--teacher-load", "x", "--kd-steps", "36000"] if teacher else []
    config = parse(["--config", str(EXAMPLES / "model_2p8b.yaml"), *taught, *words])
    layout, plan = check(config, world)
    model = parse(["--config", str(EXAMPLES / "model_1p5b.yaml")]).model
    fused = Precision(implementation="transformer_engine")
    return PlannedRun(
        config=config, layout=layout, plan=plan, vocabulary_size=256000, precision=fused, device="cuda", capability=(9, 0),
        teacher=PlannedTeacher(model=model, vocabulary_size=256000, precision=fused) if teacher else None,
    )  # fmt: skip


def sent(run: PlannedRun, stage: int, taught: bool = False) -> dict[tuple[str, str, str], float]:
    """{(group, collective, phase): bytes that a rank of the stage sends}"""
    layers = run.config.model.num_layers // run.layout.pipeline
    found: dict[tuple[str, str, str], float] = {}
    for one in student_transfers(run, BY_FLOPS, stage, layers, taught=taught):
        key = (one.group, one.collective, one.phase)
        found[key] = found.get(key, 0.0) + one.sent
    return found


def test_the_flops_of_a_step_are_those_of_the_formula():
    run = large(64)
    step = step_time(run, BY_FLOPS, taught=False)
    tokens = 2048 / 64 * 1280
    layers = 28 * (2 * (2560 * 3 * 2560 + 2560 * 2560 + 3 * 2560 * 6656) + 2 * 2560 * 1280)
    by_hand = 3 * tokens * (layers + 2 * 2560 * 256000)
    assert step.stages[0].flops == pytest.approx(by_hand, rel=1e-9)
    assert step.total == step.passes == pytest.approx(by_hand / 1e12, rel=1e-9) and step.bubble == pytest.approx(0, abs=1e-9)
    taught = step_time(run, BY_FLOPS, taught=True)
    body = tokens * 20 * (2 * (2048 * 4 * 2048 + 3 * 2048 * 5120) + 2 * 2048 * 1280)
    assert taught.teacher == pytest.approx(body / 1e12, rel=1e-9)
    assert taught.total - step.total == pytest.approx((body + tokens * 2 * 2048 * 256000) / 1e12, rel=1e-9)
    again = step_time(
        large(64, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
        BY_FLOPS, taught=False,
    )  # fmt: skip
    assert again.total - step.total == pytest.approx(tokens * layers / 1e12, rel=1e-9)


def test_a_run_without_pipeline_and_links_takes_what_start_up_predicts():
    run = large(1, "--global-batch-size", "32")
    machine = replace(machine_of(FLAGS, run) or BY_FLOPS, in_node=math.inf, between_nodes=math.inf)
    times = run_time(run, machine)
    assert times.balance is not None and times.stage1 is not None
    assert times.stage2.total == pytest.approx(times.balance.times.stage2, rel=1e-6)
    assert times.stage1.total == pytest.approx(times.balance.times.stage1, rel=1e-6)


def test_bytes_of_tensor_parallel_groups():
    hidden, times, half = 4 * 1280 * 2560 * 2, 2048 // 32 // 4, 1 / 2  # (g - 1) / g with two ranks; 16 microbatches
    run = large(64, "--tensor-model-parallel-size", "2", teacher=False)
    assert sent(run, 0)["tp", "all-reduce", "forward"] == pytest.approx(2 * half * hidden * (2 * 28 + 1 + 1) * times)
    assert sent(run, 0)["tp", "all-reduce", "backward"] == pytest.approx(2 * half * hidden * 2 * 28 * times)
    split = sent(large(64, "--tensor-model-parallel-size", "2", "--sequence-parallel", teacher=False), 0)
    assert split["tp", "reduce-scatter", "forward"] == pytest.approx(half * hidden * (2 * 28 + 2) * times)
    sums = 4 * 4 * 1280 * 4 * 2
    assert split["tp", "all-gather", "forward"] == pytest.approx(half * (hidden * (2 * 28 + 1) + sums) * times)
    assert split["tp", "all-gather", "backward"] == pytest.approx(half * hidden * (4 * 28 + 1) * times)
    assert (traffic.SUMS, traffic.SUMS_TAUGHT) == (NUM_SUMS, 2 * NUM_SUMS + NUM_SOFT_SUMS)


def test_bytes_of_data_parallel_and_context_parallel_groups():
    found, numbers = sent(large(64), 0), 2_818_000_000
    assert found["dp", "reduce-scatter", "gradients"] == pytest.approx(63 / 64 * 4 * numbers, rel=0.01)
    assert found["dp", "all-gather", "parameters"] == pytest.approx(63 / 64 * 2 * numbers, rel=0.01)
    ring = sent(large(64, "--context-parallel-size", "2"), 0)
    whole = 4 * 1280 * 2 * 2560 * 2  # keys and values of a microbatch
    assert ring["cp", "all-gather", "forward"] == pytest.approx(whole / 2 * 28 * 16)
    assert (
        ring["cp", "all-gather", "backward"] == ring["cp", "reduce-scatter", "backward"] == pytest.approx(whole / 2 * 28 * 16)
    )
    gathered = sent(planned(2, context_parallel_size=2), 0)
    assert ("cp", "all-gather", "backward") not in gathered and ("dp", "all-reduce", "gradients") in gathered


def test_bytes_between_pipeline_stages():
    run = large(64, "--pipeline-model-parallel-size", "4")
    boundary, times = 4 * 1280 * 2560 * 2, 2048 // 16 // 4
    first, last = sent(run, 0), sent(run, 3)
    assert first["pp", "send", "forward"] == last["pp", "send", "backward"] == boundary * times
    assert ("pp", "send", "backward") not in first and ("pp", "send", "forward") not in last
    assert first["embedding", "all-reduce", "gradients"] == 4 * 256000 * 2560 and (
        "embedding",
        "all-reduce",
        "gradients",
    ) not in sent(run, 1)
    chunked = sent(large(64, "--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "7"), 0)
    assert (
        chunked["pp", "send", "forward"] == 7 * boundary * times and chunked["pp", "send", "backward"] == 6 * boundary * times
    )


def test_bytes_of_the_teacher():
    run = large(64, "--pipeline-model-parallel-size", "4", "--teacher-tensor-model-parallel-size", "2")
    by_group = {one.group: one for one in teacher_transfers(run, BY_FLOPS)}
    hidden = 4 * 1280 * 2048 * 2
    assert by_group["teacher tp"].sent == hidden * (2 * 20 + 1) * 16  # 2 of 4 ranks each, half of 32 microbatches
    # The first rank of each teacher replica sends, places 0 and 2, and place 3 receives all 32 microbatches.
    assert by_group["exchange"].sent == hidden * 32
    assert teacher_transfers(large(64), BY_FLOPS) == []


@pytest.mark.parametrize("guide", ["hidden", "both"])
def test_a_guided_run_counts_what_its_teacher_computes_and_sends(guide):
    """Layer 3 is on the first of four stages, the head on the last. Of four teachers of one rank each computes 8 of 32 microbatches."""
    plain = large(64, "--pipeline-model-parallel-size", "4")
    config = plain.config
    salt = replace(config.salt, guide=guide, let_steps=36000, kd_steps=36000 if guide == "both" else None)
    run = replace(plain, config=replace(config, salt=salt))
    hidden = run.plan.micro_batch_size * config.training.seq_length * run.teacher.model.hidden_size * 2
    exchange = {one.group: one for one in teacher_transfers(run, BY_FLOPS)}["exchange"]
    # Place 0 keeps the 8 microbatches that it computes and gets 24 others; for soft labels place 3 does, too.
    assert exchange.message == 24 * hidden
    times, before = run_time(run, BY_FLOPS), run_time(plain, BY_FLOPS)
    head = times.tokens * head_flops(run.teacher.model, config.model.padded_vocabulary_size(256000))
    assert before.teacher_flops - times.teacher_flops == pytest.approx(0.0 if guide == "both" else head)
    saved = before.stage1.stages[-1].flops - times.stage1.stages[-1].flops
    assert saved == pytest.approx(0.0 if guide == "both" else head / (64 / 4))
    assert times.balance.soft_labels == (guide == "both") and (", its head" in times.balance.lines()[0]) == (guide == "both")


@pytest.mark.parametrize("kd_steps, let_steps", [(36000, 20000), (20000, 36000), (20000, 20000), (20000, 10**9)])
def test_a_part_of_stage_1_takes_the_time_of_what_is_taught_in_it(kd_steps, let_steps):
    plain = large(64, "--pipeline-model-parallel-size", "4")
    both, labels, hidden = (
        replace(plain, config=replace(plain.config, salt=replace(plain.config.salt, **flags)))
        for flags in (
            dict(guide="both", kd_steps=kd_steps, let_steps=let_steps),
            dict(kd_steps=kd_steps),
            dict(guide="hidden", kd_steps=None, let_steps=let_steps),
        )
    )
    ends = [min(steps, plain.plan.total_steps) for steps in (kd_steps, let_steps)]
    first, *rest = both.stage1_parts()
    assert first == (min(ends), both) and [steps for steps, _ in rest] == [max(ends) - min(ends)] * (kd_steps != let_steps)
    for _, part in rest:
        alone = labels if kd_steps > let_steps else hidden
        assert step_time(part, BY_FLOPS, taught=True) == step_time(alone, BY_FLOPS, taught=True)
    assert labels.stage1_parts() == ((ends[0], labels),) and hidden.stage1_parts() == ((ends[1], hidden),)


def test_what_a_cache_holds_is_neither_computed_nor_sent():
    run = large(64, "--pipeline-model-parallel-size", "4", "--teacher-tensor-model-parallel-size", "2")
    linked = replace(BY_FLOPS, in_node=1e9, between_nodes=1e9)
    cold, half, warm = (run_time(replace(run, cached_share=share), linked) for share in (0.0, 0.5, 1.0))
    assert cold.stage1 is not None and half.stage1 is not None and warm.stage1 is not None
    assert half.stage1.teacher == cold.stage1.teacher / 2 > 0 and half.stage1.exchange == cold.stage1.exchange / 2 > 0
    assert warm.stage1.teacher == warm.stage1.exchange == 0 and warm.stage1.passes == cold.stage1.passes
    assert warm.teacher_transfers == () and warm.stage2 == cold.stage2
    head = 2048 * 1280 * 2 * 2048 * 256000
    assert warm.teacher_flops == pytest.approx(head)
    assert half.teacher_flops == pytest.approx((cold.teacher_flops + head) / 2)


def test_an_evaluation_is_the_forward_passes_of_a_step():
    words = ("--eval-iters", "10", "--eval-interval", "5000", "--valid-share", "0", "--valid-data-path", "a=x", "b=y")
    run = large(64, *words, teacher=False)
    times = run_time(run, BY_FLOPS)
    [stage] = times.stage2.stages
    assert times.evaluation == pytest.approx(8 * sum(chunk.forward for chunk in stage.chunks))  # 8 microbatches, no pipeline
    [told] = evaluation_lines(run, times)
    hours = 43 * 2 * 10 * times.evaluation / 3600  # 208,000 / 5,000 is 41.6: step 0, 41 times, and after the last step
    assert f"at most {hours:,.1f} h" in told and "43 times 10 batches of 2 held-out sets" in told
    assert evaluation_lines(large(64, "--eval-iters", "0", teacher=False), times) == []


def test_a_group_on_several_nodes_uses_the_network():
    machine = machine_of(FLAGS, large(64))
    assert machine is not None and machine.link([0, 7]) == 0.8 * 450e9 and machine.link([7, 8]) == 0.8 * 50e9
    given = machine_of(replace(FLAGS, nvlink_gbs=100.0, network_gbs=10.0, gpus_per_node=4, mfu=0.4), large(64))
    assert given is not None and given.link([0, 3]) == 0.8 * 100e9 and given.link([3, 4]) == 0.8 * 10e9
    assert given.rates.layers.flops == pytest.approx(0.4 * 989.5e12) and given.peak_flops == 989.5e12
    assert set(NVLINK_GBS) <= set(CARDS)
    assert machine_of(replace(FLAGS, gpu="a GPU without a name"), large(64)) is None


def test_what_passes_hide_of_gradients_and_parameters():
    hidden, open_ = large(64), large(64, "--no-overlap-grad-reduce", "--no-overlap-param-gather")
    slow = replace(BY_FLOPS, between_nodes=1e12, in_node=1e12)
    gradients, parameters = (step_time(open_, slow, taught=False).stages[0].seconds("dp"), 0.0)
    assert step_time(open_, slow, taught=False).gradients == pytest.approx(gradients)
    assert step_time(hidden, slow, taught=False).gradients == parameters


def test_the_report_has_the_parts_of_each_step():
    run = planned(4, (1, 2), pipeline_model_parallel_size=4)
    lines = time_lines(run, BY_FLOPS, run_time(run, BY_FLOPS))
    assert lines[0].startswith("times are estimates, no GPU has confirmed them")
    assert sum(line.startswith("pp ") and " stage 1 " in line for line in lines) == 4
    assert any(line.startswith("start-up will say: a step of stage 1 takes") for line in lines)
    assert run.teacher == PlannedTeacher(model=TEACHER, vocabulary_size=VOCABULARY, precision=TORCH)


@pytest.mark.parametrize("words, message", [
    ({"mfu": 1.5}, "--mfu must be above 0 and at most 1, got 1.5"),
    ({"nvlink_gbs": 0.0}, "--nvlink-gbs must be above 0, got 0"),
    ({"network_gbs": -1.0}, "--network-gbs must be above 0, got -1"),
    ({"gpus_per_node": 0}, "--gpus-per-node must be at least 1, got 0"),
])  # fmt: skip
def test_rates_that_no_machine_has_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        replace(FLAGS, **words)
