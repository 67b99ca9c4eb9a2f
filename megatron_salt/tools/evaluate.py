"""Evaluate checkpoints on likelihood tasks and tokenized data. docs/tasks.md describes task files and metrics.

Any checkpoints of this repository, of any layout; several give a table. Runs in one process, or on all ranks that torchrun starts, with
tensor and pipeline parallelism; the remaining ranks are data-parallel. Each finished task is written at once. A start with the same flags
goes on after the last one. SIGTERM, SIGUSR1 and --exit-file end it within two batches, with exit status 3.

    torchrun --nproc-per-node 8 tools/evaluate.py --load runs/salt runs/plain --tasks hellaswag.jsonl piqa.jsonl --output results.json
    python tools/evaluate.py --load runs/salt --data prose=/data/prose code=/data/code --output results.json
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_salt.cli import run_tool
from megatron_salt.config import ParallelConfig
from megatron_salt.errors import LeftEarly
from megatron_salt.evaluation.results import Result, as_markdown, markdown_path, read_results, write_results
from megatron_salt.evaluation.task_file import read_shots, read_tasks
from megatron_salt.files import refuse_directory, sole_writer
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.hardware import prepare_environment
from megatron_salt.parallel.layout import Layout, student_layout, world_size_from_environment
from megatron_salt.parallel.library_warnings import hide_library_warnings
from megatron_salt.tools.evaluated.candidate import (
    Candidate,
    about,
    load_model,
    names_of,
    open_candidate,
    refuse_same,
    with_data,
)
from megatron_salt.tools.evaluated.data import NamedData, evaluate_data, parse_data, window_length
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from megatron_salt.train.exit import ExitPlan, SignalWatch, leaving_with, reason_alone

if TYPE_CHECKING:
    from megatron_salt.evaluation.evaluate_task import PreparedTask
    from megatron_salt.model.gpt import GPT
    from megatron_salt.parallel.mesh import Mesh

log = logging.getLogger(__name__)

LEFT = 3  # exit status where tasks are left


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(EvaluateConfig, lambda config: fail_together(lambda: evaluate(config)), argv)


def evaluate(config: EvaluateConfig) -> int:
    """Evaluate all checkpoints on all tasks. Every rank calls. Returns the exit status: 0, or LEFT if tasks are left. Raises UserError."""
    for path in (Path(config.output), markdown_path(Path(config.output))):
        refuse_directory("--output", path)
    with leaving_with(LEFT, config.exit_file) as watch:
        return _evaluate(config, watch)


def _evaluate(config: EvaluateConfig, watch: SignalWatch) -> int:
    hide_library_warnings()
    prepare_environment(config.device)
    tasks = read_tasks(config.tasks)
    shots = read_shots(config.shots, config.shot_file, len(tasks))
    data = parse_data(config.data, [task.name for task in tasks])
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    layout = student_layout(parallel, world_size_from_environment())
    opened = [open_candidate(load, config, parallel, tasks, shots) for load in config.load]
    refuse_same(opened)
    window = window_length(config.seq_length, {one.load: one.run.training.seq_length for one in opened})
    candidates = [with_data(one, config, data, window) for one in opened]

    import torch.distributed as dist

    from megatron_salt.parallel.collectives import begin_largest
    from megatron_salt.parallel.launch import distributed

    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    with distributed(timeout, leaving=lambda: reason_alone(watch, config.exit_file), device=config.device):
        is_first = dist.get_rank() == 0
        logging.basicConfig(level=logging.INFO if is_first else logging.CRITICAL, format="%(message)s")
        exit_plan = ExitPlan(
            exit_interval=None, exit_duration_in_mins=None, watch=watch, begin=begin_largest, started=0.0, exit_file=config.exit_file,
            looks=is_first,
        )  # fmt: skip
        try:
            run_all(config, candidates, parallel, layout, exit_plan, timeout)
        except LeftEarly as left:
            if is_first:
                print(f"left: {left}; the same command goes on", flush=True)
            return LEFT
        exit_plan.finish()
    return 0


def run_all(
    config: EvaluateConfig, candidates: Sequence[Candidate], parallel: ParallelConfig, layout: Layout, exit_plan: ExitPlan,
    timeout: timedelta,
) -> None:  # fmt: skip
    """Evaluate what the output does not have yet, and print the table. Collective over all ranks; rank 0 writes. Raises LeftEarly."""
    import torch.distributed as dist

    from megatron_salt.parallel.collectives import from_rank_0
    from megatron_salt.parallel.mesh import make_student_mesh

    output, is_first = Path(config.output), dist.get_rank() == 0
    wanted = [identity for one in candidates for _, identity in one.work]
    with contextlib.ExitStack() as held:
        from_rank_0(lambda: held.enter_context(sole_writer("--output", output)))
        results = from_rank_0(lambda: as_named_now(read_results(output, wanted, config.overwrite), candidates))
        mesh = make_student_mesh(layout, timeout=timeout)
        for candidate in candidates:
            done = [one["identity"] for one in results]
            todo = [(prepared, identity) for prepared, identity in candidate.work if identity not in done]
            if is_first:
                print(about(candidate, len(todo)), flush=True)
            if not todo:
                continue
            chunks = load_model(candidate, parallel, mesh)
            exit_plan.look(f"loading {candidate.directory}")
            for prepared, identity in todo:
                result = evaluate_one(config, candidate, prepared, identity, chunks, mesh, exit_plan)
                results = [*results, result]
                from_rank_0(partial(write_results, output, in_order(results, wanted), config.metrics))
            del chunks
            gc.collect()
        from_rank_0(partial(write_results, output, in_order(results, wanted), config.metrics))  # --metrics may be others now
        if is_first:
            print(as_markdown(in_order(results, wanted), config.metrics), end="")
            print(f"written to {output} and {markdown_path(output)}", flush=True)


def evaluate_one(
    config: EvaluateConfig, candidate: Candidate, asked: PreparedTask | NamedData, identity: dict[str, Any], chunks: Sequence[GPT],
    mesh: Mesh, exit_plan: ExitPlan,
) -> Result:  # fmt: skip
    """The result of one task or dataset. Collective over all ranks; all receive. Raises LeftEarly."""
    from megatron_salt.evaluation.evaluate_task import evaluate_task

    started, stop = time.perf_counter(), exit_plan.reason_to_stop_now
    if isinstance(asked, NamedData):
        with progress_of(config, asked.name, "windows", len(asked.samples)) as progress:
            found = evaluate_data(
                asked,
                candidate.tokenizer,
                chunks,
                mesh,
                batch_tokens=config.batch_tokens,
                reason_to_stop=stop,
                on_progress=progress,
            )
    else:
        with progress_of(config, asked.task.name, "requests", len(asked.requests)) as progress:
            found = evaluate_task(
                asked,
                chunks,
                mesh,
                batch_tokens=config.batch_tokens,
                seed=config.bootstrap_seed,
                reason_to_stop=stop,
                on_progress=progress,
            )
    names = names_of(candidate, asked)
    return {**names, "identity": identity, "seconds": round(time.perf_counter() - started, 3), **found}


def as_named_now(results: Sequence[Result], candidates: Sequence[Candidate]) -> list[Result]:
    """Results of earlier starts, with the paths that this start's flags give: --load runs/a may have been --load runs/a/ before."""
    work = [(identity, names_of(one, asked)) for one in candidates for asked, identity in one.work]
    return [{**result, **next(names for identity, names in work if identity == result["identity"])} for result in results]


@contextlib.contextmanager
def progress_of(config: EvaluateConfig, name: str, unit: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A function that takes how many more requests or windows, and tokens, are done, and shows them on rank 0."""
    import torch.distributed as dist

    if dist.get_rank() != 0:
        yield lambda num, num_tokens: None
        return
    bar = ProgressBar((unit, "tokens"), total=total, unit=f" {unit}", log_interval=config.log_interval, label=f"{name}: ")
    try:
        yield lambda num, num_tokens: bar.add(bar.done + num, (num, num_tokens))
    finally:
        print(f"{name}: {bar.close()}", flush=True)


def in_order(results: Sequence[Result], wanted: Sequence[dict[str, Any]]) -> list[Result]:
    """Results in the order in which the flags name them."""
    return sorted(results, key=lambda one: wanted.index(one["identity"]))
