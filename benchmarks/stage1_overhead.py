"""The cost of the teacher: time of a step of stage 1 divided by one of stage 2, as start-up says it and as measured, on CPU ranks.

    python benchmarks/stage1_overhead.py --steps 40     three models on one core, and one of them in two pipeline stages
    python benchmarks/stage1_overhead.py --steps 7 --guide hidden     the same with hidden-state guidance instead of soft labels

The program's own `build` makes student and teacher, from a teacher's checkpoint that the program wrote. The same run then takes steps of
both stages in turns, on the same microbatches. Each stage counts by the fastest tenth of its steps, so that other work on the machine
matters little, and by the CPU seconds of the busiest rank. Wall-clock time is shown beside them. The prediction is the one that start-up
logs (salt/cost.py), measured rates included. With hidden-state guidance the median of the pairs of steps counts, in CPU seconds.
The bytes of the exchange are compared with their plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from results import result, whole

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


from megatron_salt.cli import parse
from megatron_salt.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SaltConfig,
    TokenizerConfig,
    TrainingConfig,
)  # fmt: skip
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.precision import TORCH
from megatron_salt.parallel.launch import distributed
from megatron_salt.parallel.layout import student_layout
from megatron_salt.preprocess.indexed_writer import IndexedWriter
from megatron_salt.salt import routing
from megatron_salt.salt.guidance.layer_place import stages_of_run
from megatron_salt.train.build import build
from megatron_salt.train.build_model import dtype_of
from megatron_salt.train.build_teacher import predict_cost
from megatron_salt.train.inputs import read_inputs
from megatron_salt.train.plan import plan_run
from megatron_salt.train.start import identify, name_data
from megatron_salt.train.step import train_step

SEQ_LENGTH, MICROBATCHES = 256, 4
GOAL, EXCHANGE_GOAL, LET_GOAL = 0.10, 0.05, 1.05
EXCHANGE = "c10d::alltoall_base_"

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """A student, its teacher and their vocabulary. Models are (layers, hidden size, width of the MLP, heads)."""

    vocabulary: int
    student: tuple[int, int, int, int]
    teacher: tuple[int, int, int, int]


SHAPES = {
    "small": Shape(4096, (4, 256, 704, 4), (3, 192, 512, 3)),
    "middle": Shape(8192, (7, 512, 1376, 8), (5, 384, 1024, 6)),
    "large": Shape(16384, (8, 768, 2048, 12), (5, 512, 1376, 8)),
}


@dataclass(frozen=True)
class Told:
    """The measurements of the ranks of one run."""

    predicted: float
    """A step of stage 1 divided by a step of stage 2, as start-up says it"""
    by_flops: float
    """The same by FLOPs alone"""
    rates: str
    """What the prediction measured of this CPU"""
    wall: list[list[float]]
    """[steps][stage 1, stage 2]: seconds until the last rank was done"""
    cpu: list[list[float]]
    """The same of the rank that was busiest, in CPU seconds"""
    sent_bytes: int
    """What all ranks handed to the exchange in one step"""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=whole, default=20, help="steps of each stage, for each run")
    asked.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    asked.add_argument("--bf16", action="store_true")
    asked.add_argument(
        "--guide", choices=("soft-labels", "hidden", "both"), default="soft-labels", help="what the teacher teaches"
    )
    asked.add_argument("--one-rank", action="store_true", help="leave out the run in two pipeline stages")
    asked.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)
    flags = asked.parse_args()
    if flags.rank_of is not None:
        be_a_rank(Path(flags.rank_of), flags.steps)
        return
    print(
        f"{MICROBATCHES} microbatches of {SEQ_LENGTH} tokens a step; one thread a rank; {'bfloat16' if flags.bf16 else 'float32'}"
    )
    print(f"{'':14}{'said':>8}{'by FLOPs':>10}{'measured':>10}{'/ said':>8}{'wall':>8}{'stage 2, CPU s':>16}{'busy':>7}")
    for name in flags.shapes:
        with tempfile.TemporaryDirectory() as folder:
            teach_for_one_step(Path(folder), SHAPES[name], flags.bf16)
            for stages in (1, 2) if name == "middle" and not flags.one_rank else (1,):
                report(f"{name}_pp{stages}", SHAPES[name], stages, *ask_ranks(Path(folder), SHAPES[name], stages, flags))


def report(name: str, shape: Shape, stages: int, run: RunConfig, told: Told) -> None:
    """Print a line of the table and the figures."""
    wall, cpu = (fastest_tenth(np.array(times)) for times in (told.wall, told.cpu))
    measured = cpu[0] / cpu[1]
    busy = np.sum(told.cpu) / np.sum(told.wall)
    print(f"{name:14}{told.predicted:>7.3f}x{told.by_flops:>9.3f}x{measured:>9.3f}x{measured / told.predicted:>8.3f}"
          f"{wall[0] / wall[1]:>7.3f}x{cpu[1]:>16.3f}{busy:>7.0%}", flush=True)  # fmt: skip
    print(f"  {told.rates}")
    if run.salt.guides_hidden:
        pairs = np.array(told.cpu)
        median = float(np.median(pairs[:, 0] / pairs[:, 1])) / told.predicted
        result(f"let_time_over_prediction_{run.salt.guide}_{name}", median, LET_GOAL, lower_is_better=True)
    planned, logits = exchange_bytes(run, stages, run_teacher(shape).hidden_size), exchange_bytes(run, stages, shape.vocabulary)
    assert told.sent_bytes == planned, f"a step exchanged {told.sent_bytes} bytes, its plan says {planned}"
    if not run.salt.guides_hidden:
        result(f"stage1_off_prediction_{name}", abs(measured / told.predicted - 1), GOAL, lower_is_better=True)
    if stages == 2:
        result("exchanged_over_logits", told.sent_bytes / logits, EXCHANGE_GOAL, lower_is_better=True)


def fastest_tenth(seconds: np.ndarray) -> np.ndarray:
    """Mean of the fastest tenth of the steps: [steps][stages] -> [stages]."""
    return np.sort(seconds, axis=0)[: -(-len(seconds) // 10)].mean(axis=0)


def exchange_bytes(run: RunConfig, num_ranks: int, width: int) -> int:
    """Bytes that the plan of one step moves if a position has `width` values. In a block of several ranks, bytes that stay on their rank
    count too; a block of one moves none."""
    layout = student_layout(run.parallel, num_ranks)
    plan = routing.plan_exchange(layout, routing.teacher_layout(layout, 1, 1), MICROBATCHES, 1, SEQ_LENGTH, stages_of_run(run))
    positions = sum(sum(plan.send_sizes(place)) for place in range(plan.num_places)) if plan.num_places > 1 else 0
    return positions * width * dtype_of(run.training).itemsize


# --- what the ranks run -----------------------------------------------------------------------------------------------


def model_of(layers: int, hidden: int, mlp: int, heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=mlp, num_attention_heads=heads, swiglu=True, normalization="RMSNorm",
        position_embedding_type="rope", disable_bias_linear=True, untie_embeddings_and_output_weights=True,
    )  # fmt: skip


def run_teacher(shape: Shape) -> ModelConfig:
    return model_of(*shape.teacher)


def student_run(folder: Path, shape: Shape, stages: int, flags: argparse.Namespace) -> RunConfig:
    """The run whose steps are timed."""
    salt = SaltConfig(
        teacher_load=str(folder / "teacher"), guide=flags.guide, kd_steps=None if flags.guide == "hidden" else 1,
        let_steps=None if flags.guide == "soft-labels" else 1,
    )  # fmt: skip
    return replace(
        base_run(folder, model_of(*shape.student), flags.bf16),
        parallel=ParallelConfig(pipeline_model_parallel_size=stages, account_for_loss_in_pipeline_split=stages > 1),
        salt=salt,
    )


def base_run(folder: Path, model: ModelConfig, bf16: bool) -> RunConfig:
    """A run of one step, without evaluations."""
    return RunConfig(
        model=model,
        training=TrainingConfig(
            seq_length=SEQ_LENGTH, micro_batch_size=1, global_batch_size=MICROBATCHES, train_iters=1, eval_iters=0, bf16=bf16
        ),
        data=DataConfig(data_path=(str(folder / "data"),)),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer.json")),
    )  # fmt: skip


def teach_for_one_step(folder: Path, shape: Shape, bf16: bool) -> None:
    """Write data, a tokenizer and a teacher that trained for one step. What it learnt does not matter."""
    words = {f"w{number}": number for number in range(shape.vocabulary)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, 64 * SEQ_LENGTH + 1)
    writer = IndexedWriter(str(folder / "data"), np.dtype(np.uint16))
    writer.append(tokens.astype(np.uint16), np.array([len(tokens)], np.int32))
    writer.finish()
    run = replace(
        base_run(folder, run_teacher(shape), bf16),
        checkpoint=CheckpointConfig(save=str(folder / "teacher")),
        logging=LoggingConfig(tensorboard_dir=str(folder / "tensorboard")),
    )
    (folder / "teacher.yaml").write_text(to_yaml(run))
    launch(1, "-m", "megatron_salt.pretrain", "--config", str(folder / "teacher.yaml"))


def ask_ranks(folder: Path, shape: Shape, num_ranks: int, flags: argparse.Namespace) -> tuple[RunConfig, Told]:
    """Let ranks take steps of a run. Returns the run and what they measured."""
    run = student_run(folder, shape, num_ranks, flags)
    (folder / "student.yaml").write_text(to_yaml(run))
    launch(num_ranks, str(Path(__file__).resolve()), "--rank-of", str(folder), "--steps", str(flags.steps))
    return run, Told(**json.loads((folder / "told.json").read_text()))


def launch(num_ranks: int, *words: str) -> None:
    """Run a program on ranks of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *words]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])


# --- on each rank -----------------------------------------------------------------------------------------------------


def be_a_rank(folder: Path, steps: int) -> None:
    """Build the run, take its steps, and let rank 0 write the results. Collective over all ranks."""
    torch.set_num_threads(1)
    config = parse(["--config", str(folder / "student.yaml")])
    inputs, timeout = read_inputs(config), timedelta(minutes=10)
    with distributed(timeout):
        layout = student_layout(config.parallel, dist.get_world_size())
        plan = plan_run(config.training, config.parallel, layout, config.salt)
        identity = identify(config, inputs, name_data(config, plan, inputs))
        run, progress = build(config, plan, layout, inputs, identity, timeout=timeout)
        assert run.stage1 is not None and inputs.teacher is not None
        teacher, student, microbatches = run.stage1.teacher, run.student, run.train.fetch(0)
        weights = run.stage1.weights(1, progress)

        def said(config: RunConfig) -> tuple[float, str]:
            found = predict_cost(config, plan, inputs.teacher.model, inputs.tokenizer.vocabulary_size, TORCH)
            return found.ratio, found.rates.source

        def stage1() -> None:
            train_step(student, microbatches, PhaseTimer(), teacher, weights)

        def stage2() -> None:
            train_step(student, microbatches, PhaseTimer())

        for step in (stage1, stage2):  # warm-up
            step()
        no_memory = replace(config, logging=LoggingConfig(device_peak_tflops=1.0, device_peak_gb_per_s=1e15))
        (predicted, rates), (by_flops, _) = said(config), said(no_memory)
        wall, cpu = take_turns(stage1, stage2, steps)
        sent = sum_over_ranks(exchanged_bytes(stage1, dtype_of(config.training).itemsize))
        if dist.get_rank() == 0:
            (folder / "told.json").write_text(json.dumps(asdict(Told(predicted, by_flops, rates, wall, cpu, sent))))


def take_turns(stage1: Step, stage2: Step, steps: int) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of `steps` steps of both stages, wall clock and CPU, each [steps][stage 1, stage 2], of the slowest rank."""
    wall, cpu = np.zeros((steps, 2)), np.zeros((steps, 2))
    for number in range(steps):
        for stage in ((0, 1), (1, 0))[number % 2]:
            wall[number, stage], cpu[number, stage] = timed((stage1, stage2)[stage])
    times = torch.tensor(np.stack([wall, cpu]))
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times[0].tolist(), times[1].tolist()


def timed(step: Step) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this rank. All ranks start together."""
    dist.barrier()
    wall, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - busy


def exchanged_bytes(step: Step, itemsize: int) -> int:
    """Bytes that this rank gives to all-to-alls in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    exchanges = [event for event in profile.events() if event.name == EXCHANGE]
    assert len(exchanges) == (dist.get_world_size() > 1), f"{len(exchanges)} x {EXCHANGE}"
    return sum(np.prod(event.input_shapes[1]).item() * itemsize for event in exchanges)  # inputs: inbox, outbox, ...


def sum_over_ranks(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


if __name__ == "__main__":
    main()
