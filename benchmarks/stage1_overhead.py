"""The cost of the teacher: time of a step in stage 1 divided by one in stage 2, and the exchanged bytes, on CPU ranks.

    python benchmarks/stage1_overhead.py             about four minutes; two cores
    python benchmarks/stage1_overhead.py --profile   where the additional time of a step goes, on each rank

The program's own `build` makes student and teacher, from a teacher's checkpoint that the program wrote: on one rank, and on two
pipeline stages, where each rank has a replica of the teacher. The same run then takes steps of both stages in turns, on the same
microbatches. The ratio is the median over neighbouring steps, so that load on the machine affects both. It is compared with the
prediction at start (salt/cost.py), and with one by FLOPs only. Besides wall-clock time it shows the CPU seconds of the busiest rank,
which the prediction is about.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
from results import result

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
from megatron_salt.model.flops import HeadCost
from megatron_salt.model.loss_chunk import chunk_tokens
from megatron_salt.parallel.launch import distributed
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import new_group_of
from megatron_salt.preprocess.indexed_writer import IndexedWriter
from megatron_salt.salt import routing
from megatron_salt.salt.cost import predict
from megatron_salt.salt.head_cost import measure_head
from megatron_salt.train.build import build
from megatron_salt.train.build_model import dtype_of
from megatron_salt.train.inputs import read_inputs
from megatron_salt.train.plan import plan_run
from megatron_salt.train.start import identify, name_data
from megatron_salt.train.step import train_step

VOCABULARY, SEQ_LENGTH, MICROBATCHES = 8192, 256, 4
TEACHER = ModelConfig(
    num_layers=5, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, swiglu=True, normalization="RMSNorm",
    position_embedding_type="rope", disable_bias_linear=True, untie_embeddings_and_output_weights=True,
)  # fmt: skip
STUDENT = replace(TEACHER, num_layers=7, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8)
GOAL, EXCHANGE_GOAL = 1.10, 0.05
EXCHANGE = "c10d::alltoall_base_"

Step = Callable[[], None]


@dataclass(frozen=True)
class Told:
    """The measurements of the ranks of one layout."""

    wall: list[list[float]]
    """[pairs][stage 1, stage 2]: seconds until the last rank was done"""
    cpu: list[list[float]]
    """The same of the rank that was busiest, in CPU seconds"""
    sent_bytes: int
    """What all ranks handed to the exchange in one step"""
    head: list[float]
    """The head's work beside its products in FLOPs a logit, without and with a teacher"""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=12, help="steps of each stage, for each layout")
    asked.add_argument("--bf16", action="store_true")
    asked.add_argument("--profile", action="store_true", help="profile steps of both stages instead of timing them")
    asked.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)
    flags = asked.parse_args()
    if flags.rank_of is not None:
        be_a_rank(Path(flags.rank_of), flags.pairs, flags.profile)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teach_for_one_step(folder, flags.bf16)
        runs = {stages: student_run(folder, stages, flags.bf16) for stages in (1, 2)}
        told = {stages: ask_ranks(folder, run, stages, flags) for stages, run in runs.items()}
    if not flags.profile:
        report(runs, told)


def report(runs: dict[int, RunConfig], told: dict[int, Told]) -> None:
    """Print a table and the figures."""
    ratios, cpu_ratios, predicted = (
        {},
        {},
        {stages: prediction(run, HeadCost(*told[stages].head)) for stages, run in runs.items()},
    )
    by_flops = {stages: prediction(run, HeadCost(0, 0)) for stages, run in runs.items()}
    print(f"{MICROBATCHES} microbatches of {SEQ_LENGTH} tokens a step; vocabulary {VOCABULARY}; one thread a rank")
    print(
        f"{'':6}{'stage 2, s':>12}{'stage 1 / 2':>13}{'quartiles':>16}{'CPU':>9}{'predicted':>12}{'by FLOPs':>11}{'pairs':>8}{'busy':>7}"
    )
    for stages, of in told.items():
        low, ratios[stages], high = statistics.quantiles([first / second for first, second in of.wall], n=4)
        cpu_ratios[stages] = statistics.median(first / second for first, second in of.cpu)
        busy = np.sum(of.cpu) / np.sum(of.wall)
        seconds = statistics.median(second for _, second in of.wall)
        print(f"{f'pp {stages}':6}{seconds:>12.2f}{ratios[stages]:>12.3f}x"
              f"{f'{low:.3f}-{high:.3f}':>16}{cpu_ratios[stages]:>8.3f}x{predicted[stages]:>11.3f}x{by_flops[stages]:>10.3f}x"
              f"{len(of.wall):>8}{busy:>7.0%}")  # fmt: skip
    print("CPU: in CPU seconds of the busiest rank. busy: share of a core that this rank got, waiting for the other left out.")
    for stages, run in runs.items():
        planned, logits = exchange_bytes(run, stages, TEACHER.hidden_size), exchange_bytes(run, stages, VOCABULARY)
        print(
            f"pp {stages}: a step exchanges {told[stages].sent_bytes} bytes, planned {planned}; as logits they would be {logits}"
        )
        assert told[stages].sent_bytes == planned, "a step exchanged something else than its plan says"
    for stages, ratio in ratios.items():
        result(f"stage1_over_prediction_pp{stages}", ratio / predicted[stages], GOAL, lower_is_better=True)
        result(f"stage1_over_prediction_pp{stages}_cpu", cpu_ratios[stages] / predicted[stages], GOAL, lower_is_better=True)
    result(
        "exchanged_over_logits",
        told[2].sent_bytes / exchange_bytes(runs[2], 2, VOCABULARY),
        EXCHANGE_GOAL,
        lower_is_better=True,
    )


def prediction(run: RunConfig, head: HeadCost) -> float:
    """The prediction at start: a step of stage 1 divided by a step of stage 2."""
    return predict(
        run.model, run.parallel, TEACHER, teacher_tensor=1, teacher_pipeline=1, padded_vocabulary_size=VOCABULARY,
        num_microbatches=MICROBATCHES, merge=1, seq_length=SEQ_LENGTH, head=head,
    ).ratio  # fmt: skip


def exchange_bytes(run: RunConfig, num_ranks: int, width: int) -> int:
    """Bytes that the plan of one step moves if a position has `width` values. In a block of several ranks, bytes that stay on their rank
    count too; a block of one moves none."""
    layout = student_layout(run.parallel, num_ranks)
    plan = routing.plan_exchange(layout, routing.teacher_layout(layout, 1, 1), MICROBATCHES, 1, SEQ_LENGTH)
    positions = sum(sum(plan.send_sizes(place)) for place in range(plan.num_places)) if plan.num_places > 1 else 0
    return positions * width * dtype_of(run.training).itemsize


# --- what the ranks run -----------------------------------------------------------------------------------------------


def student_run(folder: Path, stages: int, bf16: bool) -> RunConfig:
    """The run whose steps are timed."""
    return replace(
        base_run(folder, STUDENT, bf16),
        parallel=ParallelConfig(pipeline_model_parallel_size=stages, account_for_loss_in_pipeline_split=stages > 1),
        salt=SaltConfig(teacher_load=str(folder / "teacher"), kd_steps=1),
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


def teach_for_one_step(folder: Path, bf16: bool) -> None:
    """Write data, a tokenizer and a teacher that trained for one step. What it learnt does not matter."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 64 * SEQ_LENGTH + 1)
    writer = IndexedWriter(str(folder / "data"), np.dtype(np.uint16))
    writer.append(tokens.astype(np.uint16), np.array([len(tokens)], np.int32))
    writer.finish()
    run = replace(
        base_run(folder, TEACHER, bf16),
        checkpoint=CheckpointConfig(save=str(folder / "teacher")),
        logging=LoggingConfig(tensorboard_dir=str(folder / "tensorboard")),
    )
    (folder / "teacher.yaml").write_text(to_yaml(run))
    launch(1, "-m", "megatron_salt.pretrain", "--config", str(folder / "teacher.yaml"))


def ask_ranks(folder: Path, run: RunConfig, num_ranks: int, flags: argparse.Namespace) -> Told:
    """Let ranks take steps of a run and return what they measured."""
    (folder / "student.yaml").write_text(to_yaml(run))
    profile = ["--profile"] if flags.profile else []
    launch(num_ranks, str(Path(__file__).resolve()), "--rank-of", str(folder), "--pairs", str(flags.pairs), *profile)
    return Told(**json.loads((folder / "told.json").read_text()))


def launch(num_ranks: int, *words: str) -> None:
    """Run a program on ranks of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *words]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])


# --- on each rank -----------------------------------------------------------------------------------------------------


def be_a_rank(folder: Path, pairs: int, profile: bool) -> None:
    """Build the run, take its steps, and let rank 0 write the results. Collective over all ranks."""
    torch.set_num_threads(1)
    config = parse(["--config", str(folder / "student.yaml")])
    inputs, timeout = read_inputs(config), timedelta(minutes=5)
    with distributed(timeout):
        layout = student_layout(config.parallel, dist.get_world_size())
        plan = plan_run(config.training, config.parallel, layout, config.salt)
        identity = identify(config, inputs, name_data(config, plan, inputs))
        run, _ = build(config, plan, layout, inputs, identity, timeout=timeout)
        assert run.stage1 is not None
        teacher, student, microbatches = run.stage1.teacher, run.student, run.train.fetch(0)

        def stage1() -> None:
            train_step(student, microbatches, PhaseTimer(), teacher, config.salt.kd_weight)

        def stage2() -> None:
            train_step(student, microbatches, PhaseTimer())

        for step in (stage1, stage2):  # warm-up
            step()
        if profile:
            told = Told([], [], 0, [])
            compare_profiles(stage1, stage2)
        else:
            wall, cpu = take_turns(stage1, stage2, pairs)
            sent = sum_over_ranks(exchanged_bytes(stage1, dtype_of(config.training).itemsize))
            told = Told(wall, cpu, sent, measured_head(config))
        if dist.get_rank() == 0:
            (folder / "told.json").write_text(json.dumps(asdict(told)))


def measured_head(config: RunConfig) -> list[float]:
    """The cost of the head, measured as at start. Collective over all ranks."""
    dtype, training = dtype_of(config.training), config.training
    alone = new_group_of([[rank] for rank in range(dist.get_world_size())], timedelta(minutes=5), "alone")
    chunk = chunk_tokens(training, VOCABULARY, "cpu")
    cost = measure_head(dtype, VOCABULARY, config.model.hidden_size, chunk, alone)
    return [cost.plain, cost.distilled]


def take_turns(stage1: Step, stage2: Step, pairs: int) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of `pairs` steps of both stages, wall clock and CPU, each [pairs][stage 1, stage 2], of the slowest rank."""
    wall, cpu = np.zeros((pairs, 2)), np.zeros((pairs, 2))
    for pair in range(pairs):
        for stage in ((0, 1), (1, 0))[pair % 2]:
            wall[pair, stage], cpu[pair, stage] = timed((stage1, stage2)[stage])
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


def compare_profiles(stage1: Step, stage2: Step, num_operators: int = 20) -> None:
    """Milliseconds that stage 1 adds to a step, for each operator, rank by rank."""
    with_teacher, without = profiled(stage1), profiled(stage2)
    names = sorted(with_teacher | without, key=lambda name: without.get(name, 0.0) - with_teacher.get(name, 0.0))
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            print(f"\nrank {rank}, ms inside an operator{'stage 1':>30}{'stage 2':>10}{'more':>10}")
            for name in names[:num_operators]:
                first, second = with_teacher.get(name, 0.0), without.get(name, 0.0)
                print(f"{name[:50]:50}{first:>10.1f}{second:>10.1f}{first - second:>10.1f}", flush=True)


def profiled(step: Step, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step for each operator, without the operators that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    return {event.key: event.self_cpu_time_total / 1e3 / steps for event in profile.key_averages()}


if __name__ == "__main__":
    main()
