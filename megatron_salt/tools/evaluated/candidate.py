"""A checkpoint that tools/evaluate.py evaluates: its small files, what is asked of it, and its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_salt.config import ParallelConfig, RunConfig
from megatron_salt.errors import UserError
from megatron_salt.evaluation.task_file import Task
from megatron_salt.model.shapes import check_shapes
from megatron_salt.tokenizer.tokenizer import Tokenizer
from megatron_salt.tools.evaluated.data import NamedData, open_data
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from megatron_salt.tools.generate_text import ids_in_softmax, newest_checkpoint, read_companions

if TYPE_CHECKING:
    from megatron_salt.evaluation.evaluate_task import PreparedTask
    from megatron_salt.model.gpt import GPT
    from megatron_salt.parallel.mesh import Mesh


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


def names_of(candidate: Candidate, asked: PreparedTask | NamedData) -> dict[str, Any]:
    """What a result says of where its checkpoint and its file were found."""
    name, file = (asked.name, asked.prefix) if isinstance(asked, NamedData) else (asked.task.name, asked.task.path)
    return {"load": candidate.load, "directory": str(candidate.directory), "step": candidate.step, "name": name, "file": file}
