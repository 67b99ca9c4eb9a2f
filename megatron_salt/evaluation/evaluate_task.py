"""A task for one model: its requests, and the figures that their log-likelihoods give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.errors import NonFiniteError
from megatron_salt.evaluation.log_likelihoods import Scored, log_likelihoods
from megatron_salt.evaluation.metrics import Answers, Estimate, estimates, of_example
from megatron_salt.evaluation.requests import Request, encode
from megatron_salt.evaluation.task_file import Task, with_shots, without_shots
from megatron_salt.model.gpt import GPT
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task in a tokenizer's ids."""

    task: Task
    requests: list[Request]
    """One for each answer of each example, in order."""
    facts: dict[str, Any]
    """All that decides the figures beside the model, ready for JSON."""

    @property
    def warning(self) -> str | None:
        """A line about contexts that the model cannot take whole; None where it takes all."""
        cut = [one.num_cut for one in self.requests if one.num_cut]
        if not cut:
            return None
        return (
            f"{self.task.name}: {len(cut)} of {len(self.requests)} requests are longer than the model's {self.facts['longest']} tokens; "
            f"their contexts lose {sum(cut)} tokens from the left"
        )


def prepare_task(
    task: Task,
    tokenizer: Tokenizer,
    *,
    bos: int | None,
    longest: int,
    shots: Task | None = None,
    num_shots: int = 0,
    flag_name: str = "--tasks",
) -> PreparedTask:
    """The requests of a task. bos: first id of every text; None: no such id. longest: tokens that the model takes. shots: solved examples,
    of which `num_shots` come first. flag_name: the flag that named the file. Raises UserError, which names the line of the task file."""
    by_example = without_shots(task) if shots is None or num_shots == 0 else with_shots(task, shots, num_shots, flag_name)
    pairs = [pair for pairs in by_example for pair in pairs]
    places = [f"{flag_name} {task.path}, line {one.line}" for one in task.examples for _ in one.pairs]
    facts = {
        "task": task.name,
        "sha256": task.sha256,
        "shots": num_shots,
        "shot_file_sha256": None if shots is None or num_shots == 0 else shots.sha256,
        "bos": bos,
        "longest": longest,
    }
    return PreparedTask(task=task, requests=encode(pairs, tokenizer, bos, longest, places), facts=facts)


def figures(prepared: PreparedTask, scored: Scored, seed: int) -> dict[str, Estimate]:
    """The metrics of a task from its log-likelihoods. seed: of the bootstrap. Pure."""
    task, first = prepared.task, 0
    values: dict[str, list[float]] = {}
    for example in task.examples:
        own = slice(first, first := first + len(example.pairs))
        said = Answers(
            log_likelihoods=scored.log_likelihoods[own].tolist(),
            num_tokens=[request.num_scored for request in prepared.requests[own]],
            greedy=scored.greedy[own].tolist(),
        )
        for name, value in of_example(example, said, task.is_greedy).items():
            values.setdefault(name, []).append(value)
    if task.form == "contexts":  # one continuation after all contexts: its length changes no order
        values = {name: column for name, column in values.items() if not name.startswith("acc_norm")}
    return estimates(values, seed)


def evaluate_task(
    prepared: PreparedTask,
    chunks: Sequence[GPT],
    mesh: Mesh,
    *,
    batch_tokens: int,
    seed: int,
    reason_to_stop: Callable[[], str | None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda num_requests, num_tokens: None,
) -> dict[str, Any]:
    """The figures of a task, ready for JSON: {"examples", "cut", "metrics": {name: {"value", "stderr"}}}. Collective over all ranks; all
    receive. Arguments as of `log_likelihoods`. Raises LeftEarly,
    and NonFiniteError where a log-likelihood is not finite."""
    scored = log_likelihoods(
        chunks,
        mesh,
        prepared.requests,
        longest=prepared.facts["longest"],
        batch_tokens=batch_tokens,
        reason_to_stop=reason_to_stop,
        on_progress=on_progress,
    )
    if not np.isfinite(scored.log_likelihoods).all():
        count = int((~np.isfinite(scored.log_likelihoods)).sum())
        raise NonFiniteError(f"{prepared.task.name}: {count} of {len(scored.log_likelihoods)} log-likelihoods are not finite")
    return {
        "examples": len(prepared.task.examples),
        "cut": sum(one.num_cut > 0 for one in prepared.requests),
        "metrics": {name: asdict(estimate) for name, estimate in figures(prepared, scored, seed).items()},
    }
