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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_salt.cli import run_tool
from megatron_salt.config import ParallelConfig, RunConfig
from megatron_salt.errors import LeftEarly, UserError
from megatron_salt.evaluation.results import Result, as_markdown, markdown_path, read_results, write_results
from megatron_salt.evaluation.task_file import Task, read_shots, read_tasks
from megatron_salt.files import refuse_directory, sole_writer
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.hardware import prepare_environment
from megatron_salt.parallel.layout import Layout, student_layout, world_size_from_environment
from megatron_salt.parallel.library_warnings import hide_library_warnings
from megatron_salt.tokenizer.tokenizer import Tokenizer
from megatron_salt.tools.evaluate_data import NamedData, evaluate_data, open_data, parse_data, window_length
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from megatron_salt.tools.generate_text import ids_in_softmax, newest_checkpoint, read_companions
from megatron_salt.train.exit import ExitPlan, SignalWatch, leaving_with, reason_alone

if TYPE_CHECKING:
    from megatron_salt.evaluation.evaluate_task import PreparedTask
    from megatron_salt.model.gpt import GPT
    from megatron_salt.parallel.mesh import Mesh

log = logging.getLogger(__name__)

LEFT = 3  # exit status where tasks are left


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that is evaluated."""

    load: str
    """As --load names it."""
    directory: Path
    fingerprint: str
    run: RunConfig
    tokenizer: Tokenizer
    step: int
    dtype: str
    work: list[tuple[PreparedTask | NamedData, dict[str, Any]]]
    """Tasks in its tokenizer's ids, then its data, and the identity of each result."""


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


def open_candidate(
    load: str, config: EvaluateConfig, parallel: ParallelConfig, tasks: Sequence[Task], shots: Sequence[Task | None]
) -> Candidate:
    """Read a checkpoint's small files, and encode the tasks with its tokenizer. Not collective. Raises UserError."""
    from megatron_salt.checkpoint.loading import checkpoint_fingerprint
    from megatron_salt.checkpoint.state_file import read_state
    from megatron_salt.evaluation.evaluate_task import prepare_task
    from megatron_salt.evaluation.requests import first_id

    directory = newest_checkpoint(Path(load))
    run, tokenizer = read_companions(directory)
    longest, fingerprint = run.training.seq_length, checkpoint_fingerprint(directory)
    dtype = config.dtype or ("bfloat16" if run.training.bf16 else "float32")
    decides = {"checkpoint": fingerprint, "dtype": dtype, "bootstrap_seed": config.bootstrap_seed}
    work: list[tuple[PreparedTask | NamedData, dict[str, Any]]] = []
    with naming(load, config):
        check_shapes(run.model, parallel, longest)
        bos = first_id(tokenizer, config.add_bos)
        for task, shot_file in zip(tasks, shots, strict=True):
            prepared = prepare_task(task, tokenizer, bos=bos, longest=longest, shots=shot_file, num_shots=config.shots)
            work.append((prepared, decides | prepared.facts))
    return Candidate(
        load=load,
        directory=directory,
        fingerprint=fingerprint,
        run=run,
        tokenizer=tokenizer,
        step=read_state(directory).run.step,
        dtype=dtype,
        work=work,
    )


def with_data(candidate: Candidate, config: EvaluateConfig, data: Mapping[str, str], window: int) -> Candidate:
    """The candidate with the data, {name: prefix}, in windows of so many tokens as further work. Not collective. Raises UserError."""
    with naming(candidate.load, config):
        opened = [open_data(name, prefix, candidate.tokenizer, candidate.run.data, window) for name, prefix in data.items()]
    decides = {"checkpoint": candidate.fingerprint, "dtype": candidate.dtype}
    return replace(candidate, work=[*candidate.work, *((one, decides | one.facts) for one in opened)])


@contextlib.contextmanager
def naming(load: str, config: EvaluateConfig) -> Iterator[None]:
    """Say in a UserError of the block which checkpoint of several it is about."""
    try:
        yield
    except UserError as error:
        if len(config.load) == 1 or type(error) is not UserError:
            raise
        raise UserError(f"{error} (with --load {load})") from error


def refuse_same(candidates: Sequence[Candidate]) -> None:
    """Raise UserError where two of --load are one checkpoint, however they are spelled: results are known by their checkpoint."""
    first: dict[str, Candidate] = {}
    for one in candidates:
        same = first.setdefault(one.fingerprint, one)
        if same is not one:
            raise UserError(f"--load {same.load} and {one.load} are the same checkpoint, {one.directory.name}; give it once")


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


def about(candidate: Candidate, num_todo: int) -> str:
    """Lines about a checkpoint, shown before its tasks."""
    prepared = [one for one, _ in candidate.work if not isinstance(one, NamedData)]
    bos = next((one.facts["bos"] for one in prepared), None)
    lines = [
        f"{candidate.directory}: step {candidate.step}, {len(candidate.work)} results, {len(candidate.work) - num_todo} of them finished "
        f"before; texts begin with {'no BOS' if bos is None else f'BOS (id {bos})'}; computed in {candidate.dtype}"
        + ("" if candidate.dtype == "float32" else ", where the log-likelihood of a token may differ by 0.02 between layouts")
    ]
    if lengths := [one.facts["seq_length"] for one, _ in candidate.work if isinstance(one, NamedData)]:
        lines.append(f"windows of --data have {lengths[0]} tokens, the model takes {candidate.run.training.seq_length}")
    return "\n".join(lines + [one.warning for one in prepared if one.warning])


def load_model(candidate: Candidate, parallel: ParallelConfig, mesh: Mesh) -> list[GPT]:
    """This rank's part of a checkpoint's model. Collective over all ranks. Raises UserError."""
    import torch

    from megatron_salt.checkpoint.loading import load_weights
    from megatron_salt.model.gpt import build_model
    from megatron_salt.parallel.launch import seed_everything

    run = candidate.run
    seed_everything(run.training.seed, mesh)  # building a model uses the random generators
    length = run.training.seq_length
    chunks = build_model(
        run.model,
        parallel,
        length,
        ids_in_softmax(candidate.directory, candidate.tokenizer),
        getattr(torch, candidate.dtype),
        length,
        mesh,
    )
    load_weights(candidate.directory, chunks, mesh)
    return chunks


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


def names_of(candidate: Candidate, asked: PreparedTask | NamedData) -> dict[str, Any]:
    """What a result says of where its checkpoint and its file were found."""
    name, file = (asked.name, asked.prefix) if isinstance(asked, NamedData) else (asked.task.name, asked.task.path)
    return {"load": candidate.load, "directory": str(candidate.directory), "step": candidate.step, "name": name, "file": file}


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
