"""Training tokens/s of the torch layers on one CPU rank against the same model and step in plain PyTorch (plain_gpt.py).

    python benchmarks/train_step.py             about three minutes
    python benchmarks/train_step.py --full      about ten minutes: more steps
    python benchmarks/train_step.py --profile   where the time of a step goes, and where the two differ

Both start from the same weights, take the same batches in turns, and must reach the same losses. The ratio is the median over
neighbouring pairs of steps, so that load on the machine affects both. One thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from plain_gpt import Batch, PlainGPT, PlainTrainer
from results import result

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


from megatron_salt.config import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.launch import distributed, seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh
from megatron_salt.train.build_model import build_student, count_parameters
from megatron_salt.train.plan import plan_run
from megatron_salt.train.step import Student, train_step, unwrap

VOCABULARY, SEQ_LENGTH, MICRO_BATCH, MICROBATCHES = 8192, 256, 4, 2
TOKENS = SEQ_LENGTH * MICRO_BATCH * MICROBATCHES
GOAL = 0.95
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, lr_decay_style="constant")

SHAPE = ModelConfig(
    num_layers=8, num_attention_heads=8, swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
    disable_bias_linear=True, untie_embeddings_and_output_weights=True,
)  # fmt: skip
MODELS = {
    "10M": replace(SHAPE, hidden_size=256, ffn_hidden_size=704),
    "30M": replace(SHAPE, hidden_size=512, ffn_hidden_size=1376),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Step = Callable[[], float]
"""One training step on the benchmark's batches; returns the loss before it."""


@dataclass(frozen=True)
class Pair:
    """Two copies of a model, ours and plain PyTorch's, on the same batches."""

    ours: Step
    plain: Step
    parameters: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one step of each, taken one after the other: wall clock, and CPU time of this process."""

    ours: float
    plain: float
    ours_cpu: float
    plain_cpu: float


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    asked.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    asked.add_argument("--full", action="store_true", help="more steps")
    asked.add_argument("--profile", action="store_true", help="profile three steps of each instead of timing them")
    flags = asked.parse_args()
    torch.set_num_threads(1)
    assert current_device().type == "cpu", "this benchmark is about the CPU"
    with distributed(timedelta(minutes=5)):
        mesh = make_student_mesh(Layout())
        print(f"{TOKENS} tokens a step: {MICROBATCHES} x {MICRO_BATCH} x {SEQ_LENGTH}; vocabulary {VOCABULARY}; 1 thread")
        wanted = [(model, dtype) for model in flags.models for dtype in flags.dtypes]
        pairs = {(model, dtype): make_pair(MODELS[model], DTYPES[dtype], mesh) for model, dtype in wanted}
        if flags.profile:
            for (model, dtype), pair in pairs.items():
                compare_profiles(f"{model} {dtype}", pair)
        else:
            compare_speed(pairs, seconds=120 if flags.full else 25)


def compare_speed(pairs: dict[tuple[str, str], Pair], seconds: float) -> None:
    """Time each pair for about that many seconds. Prints a table and the figures."""
    ratios = {}
    print(f"{'':27}{'tokens/s: ours':>17}{'plain':>8}{'ratio':>8}{'quartiles':>16}{'CPU':>8}{'busy':>6}{'pairs':>7}")
    for (model, dtype), pair in pairs.items():
        agree(pair, tolerance=1e-4 if dtype == "fp32" else 1e-2)
        ratios[f"{model}_{dtype}"] = report(f"{model:>8}{dtype:>7}", pair, take_turns(pair, seconds))
    print("CPU: the ratio in CPU seconds. busy: share of a core that this process got; far from 100%, read CPU, not ratio.")
    for name, ratio in ratios.items():
        result(f"tokens_per_s_over_plain_{name}", ratio, GOAL)


def make_pair(model: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> Pair:
    """Our step and the plain one, from the same weights on the same batches."""
    config = RunConfig(
        model=model,
        optimizer=OPTIMIZER,
        training=TrainingConfig(
            seq_length=SEQ_LENGTH, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * MICROBATCHES,
            train_iters=10_000, bf16=dtype == torch.bfloat16,
        ),
    )  # fmt: skip
    seed_everything(config.training.seed, mesh)
    student = build_student(config, plan_run(config.training, config.parallel, mesh.layout, config.salt), VOCABULARY, mesh)
    microbatches = random_microbatches()
    batches: list[Batch] = [(microbatch.tokens, microbatch.labels) for microbatch in microbatches]
    plain = PlainGPT(VOCABULARY, SEQ_LENGTH, model.num_layers, model.hidden_size, model.ffn_width, model.num_attention_heads)
    copy_weights(student, plain, dtype)
    trainer = PlainTrainer(plain, dtype, OPTIMIZER.lr, OPTIMIZER.weight_decay)

    def step_ours() -> float:
        sums = train_step(student, microbatches, PhaseTimer()).sums
        assert sums is not None
        tokens, loss, _ = sums.sum(0).tolist()
        return loss / tokens

    return Pair(step_ours, lambda: trainer.step(batches), count_parameters(student))


def copy_weights(student: Student, plain: PlainGPT, dtype: torch.dtype) -> None:
    """Give the plain model the student's weights. megatron-core packs query, key and value head by head."""
    weights = {name: weight.detach().float() for name, weight in unwrap(student.chunks[0]).named_parameters()}
    state = {
        "embedding.weight": weights["embedding.word_embeddings.weight"],
        "norm.weight": weights["decoder.final_layernorm.weight"],
        "head.weight": weights["output_layer.weight"],
    }
    for number, block in enumerate(plain.blocks):
        ours, theirs = f"decoder.layers.{number}.", f"blocks.{number}."
        qkv = weights[f"{ours}self_attention.linear_qkv.weight"]
        state |= {
            f"{theirs}attention_norm.weight": weights[f"{ours}input_layernorm.weight"],
            f"{theirs}mlp_norm.weight": weights[f"{ours}pre_mlp_layernorm.weight"],
            f"{theirs}qkv.weight": qkv.view(block.heads, 3, -1, qkv.size(1)).transpose(0, 1).reshape_as(qkv),
            f"{theirs}proj.weight": weights[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}gate_up.weight": weights[f"{ours}mlp.linear_fc1.weight"],
            f"{theirs}down.weight": weights[f"{ours}mlp.linear_fc2.weight"],
        }
    plain.load_state_dict(state | dict(plain.named_buffers()))


def random_microbatches() -> list[Microbatch]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (MICROBATCHES, MICRO_BATCH, SEQ_LENGTH + 1), generator=generator)
    positions = torch.arange(SEQ_LENGTH).expand(MICRO_BATCH, -1)
    mask, ids = torch.ones(MICRO_BATCH, SEQ_LENGTH), np.arange(MICRO_BATCH)
    return [
        Microbatch(
            tokens=part[:, :-1].contiguous(),
            labels=part[:, 1:].contiguous(),
            loss_mask=mask,
            position_ids=positions,
            documents=None,
            sample_ids=ids,
        )
        for part in tokens
    ]


def agree(pair: Pair, tolerance: float) -> None:
    """Two steps of warm-up, which show that both train the same model."""
    for _ in range(2):
        ours, plain = pair.ours(), pair.plain()
        assert abs(ours - plain) < tolerance, f"not the same training: loss {ours} and {plain}"


def take_turns(pair: Pair, seconds: float) -> list[Timing]:
    """Steps of both for about that many seconds, at least 7 of each. Each second time the plain one is first."""
    timings: list[Timing] = []
    end = time.perf_counter() + seconds
    while len(timings) < 7 or time.perf_counter() < end:
        if len(timings) % 2:
            (plain_s, plain_cpu), (ours_s, ours_cpu) = timed(pair.plain), timed(pair.ours)
        else:
            (ours_s, ours_cpu), (plain_s, plain_cpu) = timed(pair.ours), timed(pair.plain)
        timings.append(Timing(ours_s, plain_s, ours_cpu, plain_cpu))
    return timings


def timed(step: Step) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    wall, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - busy


def report(title: str, pair: Pair, timings: list[Timing]) -> float:
    """Print a line of the table; returns the ratio."""
    ours = TOKENS / statistics.median(timing.ours for timing in timings)
    plain = TOKENS / statistics.median(timing.plain for timing in timings)
    low, ratio, high = statistics.quantiles([timing.plain / timing.ours for timing in timings], n=4)
    cpu_ratio = statistics.median(timing.plain_cpu / timing.ours_cpu for timing in timings)
    busy = sum(timing.ours_cpu + timing.plain_cpu for timing in timings) / sum(timing.ours + timing.plain for timing in timings)
    print(
        f"{title}{pair.parameters / 1e6:>11.1f}M{ours:>17.0f}{plain:>8.0f}{ratio:>7.3f}x{f'{low:.3f}-{high:.3f}':>16}"
        f"{cpu_ratio:>7.3f}x{busy:>6.0%}{len(timings):>7}", flush=True,
    )  # fmt: skip
    return ratio


def compare_profiles(title: str, pair: Pair, num_operators: int = 25) -> None:
    """Milliseconds of a step by kind of work, and of the operators that differ most."""
    ours, plain = profiled(pair.ours), profiled(pair.plain)
    print(f"\n{title:50}{'ours, ms':>10}{'calls':>7}{'plain, ms':>11}{'calls':>7}{'difference':>12}")
    for kind in (*KINDS, ELSEWHERE):
        print_row(kind, *(total([spent for name, spent in step.items() if kind_of(name) == kind]) for step in (ours, plain)))
    print_row("all", total(ours.values()), total(plain.values()))
    print("-- operators")
    table = [(name, ours.get(name, Spent()), plain.get(name, Spent())) for name in ours | plain]
    table.sort(key=lambda row: -abs(row[1].ms - row[2].ms))
    for row in table[:num_operators]:
        print_row(*row)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("aten::_fused_adamw_",),
    "copies, fills": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "element by element, sums, look-ups": ("aten::",),
}
"""Operators by the start of their names; the first that fits."""

ELSEWHERE = "Python, autograd"


@dataclass(frozen=True)
class Spent:
    """Time inside one operator, without the operators that it calls."""

    ms: float = 0.0
    calls: float = 0.0


def kind_of(operator: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), ELSEWHERE)


def total(spent: Iterable[Spent]) -> Spent:
    together = list(spent)
    return Spent(sum(one.ms for one in together), sum(one.calls for one in together))


def print_row(name: str, ours: Spent, plain: Spent) -> None:
    print(f"{name[:50]:50}{ours.ms:>10.1f}{ours.calls:>7.0f}{plain.ms:>11.1f}{plain.calls:>7.0f}{ours.ms - plain.ms:>12.1f}")


def profiled(step: Step, steps: int = 3) -> dict[str, Spent]:
    """The time of each operator in one step, by torch's profiler, whose own cost counts for the calling operator."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    return {event.key: Spent(event.self_cpu_time_total / 1e3 / steps, event.count / steps) for event in profile.key_averages()}


if __name__ == "__main__":
    main()
