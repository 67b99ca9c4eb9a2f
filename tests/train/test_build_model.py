"""Learning rates and decay follow Megatron's formulas; biases and norms are not decayed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from megatron_salt.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.train.build_model import build_scheduler, memory_of_head
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.step import unwrap
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, Case, build_student

BATCH, STEPS = 8, 40
PEAK, LOW = 3e-3, 2e-4


@dataclass
class Groups:
    """The part of an optimizer that a schedule changes."""

    param_groups: list[dict[str, Any]] = field(default_factory=lambda: [dict(wd_mult=1.0), dict(wd_mult=0.0)])


def schedule(**flags: Any) -> tuple[list[float], list[list[float]]]:
    """Learning rate, weight decay of matrices and weight decay of the rest, for each step of a run and some steps after it."""
    groups = Groups()
    scheduler = build_scheduler(groups, OptimizerConfig(lr=PEAK, min_lr=LOW, **flags), STEPS * BATCH, BATCH)
    rates, decays = [], []
    for _ in range(STEPS + 5):
        rates.append(groups.param_groups[0]["lr"])
        decays.append([group["weight_decay"] for group in groups.param_groups])
        assert groups.param_groups[1]["lr"] == rates[-1]
        scheduler.step(increment=BATCH)
    return rates, decays


def decayed(step: int, warmup: int, end: int, shape: Any, start: float = 0.0) -> float:
    """Oracle: a line from `start` to the peak, then shape(share of the decay done) from the peak to the lowest rate."""
    if warmup and step <= warmup:
        return start + (PEAK - start) * step / warmup
    if step > end:
        return LOW
    return LOW + (PEAK - LOW) * shape((step - warmup) / (end - warmup))


def cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def linear(done: float) -> float:
    return 1 - done


@pytest.mark.parametrize("flags, expected", [
    (dict(lr_decay_style="cosine"), lambda step: decayed(step, 0, 40, cosine)),
    (dict(lr_decay_style="cosine", lr_warmup_iters=5, lr_decay_iters=30), lambda step: decayed(step, 5, 30, cosine)),
    (dict(lr_decay_style="linear", lr_warmup_fraction=0.2), lambda step: decayed(step, 8, 40, linear)),
    (dict(lr_decay_style="linear", lr_warmup_samples=24, lr_decay_samples=160, lr_warmup_init=1e-4),
     lambda step: decayed(step, 3, 20, linear, 1e-4)),
    (dict(lr_decay_style="constant", lr_warmup_iters=4), lambda step: PEAK * min(1, step / 4)),
    (dict(lr_decay_style="inverse-square-root", lr_warmup_iters=4),
     lambda step: LOW if step > 40 else PEAK * step / 4 if step <= 4 else PEAK * (4 / step) ** 0.5),
])  # fmt: skip
def test_the_learning_rate_is_the_formulas(flags, expected):
    rates, _ = schedule(**flags)
    assert rates == pytest.approx([expected(step) for step in range(len(rates))], rel=1e-12)


@pytest.mark.parametrize("style, shape", [
    ("linear", linear), ("cosine", cosine), ("exponential", lambda done: 2 * 0.5**done - 1), ("minus_sqrt", lambda done: 1 - done**0.5),
])  # fmt: skip
def test_wsd_warms_up_stays_and_decays(style, shape):
    rates, _ = schedule(lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=10, lr_warmup_iters=5)
    expected = [decayed(step, 5, 40, lambda _: 1.0) if step <= 30 else LOW + (PEAK - LOW) * shape(min(1, (step - 30) / 10)) for step in
                range(len(rates))]  # fmt: skip
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert set(rates[5:31]) == {PEAK} and rates[-1] == LOW


def test_weight_decay_grows_as_asked_for_matrices_alone():
    assert schedule(weight_decay=0.1)[1] == [[0.1, 0.0]] * (STEPS + 5)
    for style, shape in (("linear", lambda done: done), ("cosine", lambda done: 1 - cosine(done))):
        _, decays = schedule(weight_decay_incr_style=style, start_weight_decay=0.01, end_weight_decay=0.1)
        expected = [0.01 + 0.09 * shape(min(1, step / STEPS)) for step in range(STEPS + 5)]
        assert [decay for decay, _ in decays] == pytest.approx(expected)
        assert {none for _, none in decays} == {0.0}


@pytest.mark.parametrize("flags, message", [
    (dict(lr_warmup_iters=40), "comes to 320 samples, and the decay ends at 320"),
    (dict(lr_warmup_iters=20, lr_decay_iters=10), "comes to 160 samples, and the decay ends at 80"),
    (dict(lr_decay_style="WSD", lr_wsd_decay_iters=41), "--lr-wsd-decay-iters comes to 328 samples, and the whole decay has 320"),
    (dict(start_weight_decay=0.1), "--start-weight-decay 0.1"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(flags, message):
    with pytest.raises(UserError) as refused:
        schedule(**flags)
    assert message in str(refused.value)


def decay_of_parameters(case: Case) -> dict[str, float]:
    """Each parameter's weight decay multiplier."""
    student = build_student(case, 1)
    multiplier = {id(param): group["wd_mult"] for group in student.optimizer.param_groups for param in group["params"]}
    return {name: multiplier[id(param)] for name, param in unwrap(student.chunks[0]).named_parameters()}


def test_matrices_and_embeddings_are_decayed_and_biases_and_norms_are_not():
    decays = run_ranks(1, decay_of_parameters, Case(model=MODELS["layer-normed queries"]))[0]
    norms = {name for name in decays if "layernorm" in name}
    biases = {name for name in decays if name.endswith(".bias")}
    assert norms and biases - norms
    assert {name for name, decay in decays.items() if decay == 0} == norms | biases
    assert {decay for name, decay in decays.items() if name not in norms | biases} == {1.0}
    learned = run_ranks(1, decay_of_parameters, Case(model=MODELS["gpt2"]))[0]
    assert learned["embedding.position_embeddings.weight"] == learned["embedding.word_embeddings.weight"] == 1.0


def buckets(case: Case, world_size: int) -> list[list[int]]:
    """Sizes of each chunk's gradient buckets."""
    chunks = build_student(case, world_size).chunks
    return [[bucket.grad_data.numel() for buffer in chunk.buffers for bucket in buffer.buckets] for chunk in chunks]


def test_gradients_are_reduced_in_buckets_as_they_become_ready():
    whole = ParallelConfig(use_distributed_optimizer=True)
    overlap = replace(whole, overlap_grad_reduce=True, ddp_bucket_size=20_000)
    (one,), (many,) = run_ranks(2, buckets, Case(whole), 2)[0], run_ranks(2, buckets, Case(overlap), 2)[0]
    assert len(one) == 1 and len(many) > 5 and sum(many) >= sum(one)


@pytest.mark.parametrize("device_type, tokens", [("cpu", 256), ("cuda", 5120)])
def test_the_memory_of_the_head_is_that_of_the_larger_microbatch_of_both_stages(device_type: str, tokens: int) -> None:
    """256,000 ids over tp 2 in bfloat16: a CPU's 256 MiB hold 349 tokens; a GPU takes all 8 x 1,280 of stage 2, halved by cp 2."""
    config = RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=2560, num_attention_heads=20),
        parallel=ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
        training=TrainingConfig(seq_length=1280, micro_batch_size=4, bf16=True),
    )
    plan = RunPlan(total_steps=1, global_batch_size=8, micro_batch_size=4, num_microbatches=2, stage2_micro_batch_size=8)
    memory = memory_of_head(config, plan, 256000, device_type)
    assert memory.rows == 128000 and memory.tokens == tokens
    assert memory.weight_gradient_bytes == 4 * 128000 * 2560
