"""Likelihood tasks of a training run: read at its start, evaluated between steps.

The student computes as it trains, without dropout. No random number is drawn and no parameter changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint.sharded_state import settled, unwrapped
from megatron_salt.config import TrainingConfig
from megatron_salt.evaluation.evaluate_task import PreparedTask, evaluate_task, prepare_task
from megatron_salt.evaluation.requests import first_id
from megatron_salt.evaluation.task_file import read_shots, read_tasks
from megatron_salt.model.gpt import GPT
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer

BOOTSTRAP_SEED = 1234


def read_eval_tasks(training: TrainingConfig, tokenizer: Tokenizer) -> tuple[PreparedTask, ...]:
    """The tasks of --eval-tasks, with their shots, in the run's ids. Every rank reads the same files. Raises UserError."""
    flag, bos, num_shots = "--eval-tasks", first_id(tokenizer, "auto"), training.eval_tasks_shots
    tasks = read_tasks(training.eval_tasks, flag)
    shots = read_shots(num_shots, training.eval_tasks_shot_file, len(tasks), flag)
    return tuple(
        prepare_task(task, tokenizer, bos=bos, longest=training.seq_length, shots=solved, num_shots=num_shots, flag_name=flag)
        for task, solved in zip(tasks, shots, strict=True)
    )


def evaluate_tasks(
    tasks: Sequence[PreparedTask],
    chunks: Sequence[nn.Module],
    mesh: Mesh,
    batch_tokens: int,
    reason_to_stop: Callable[[], str | None],
) -> dict[str, dict[str, Any]]:
    """{name of a task: its figures as of `evaluate_task`, and its "seconds"}. Collective over all ranks; all receive.

    chunks: the student's, in their data-parallel wrappers. batch_tokens: tokens in one forward pass. Raises LeftEarly.
    """
    models = [model for model in map(unwrapped, chunks) if isinstance(model, GPT)]
    assert len(models) == len(chunks)
    figures = {}
    with settled(chunks):
        for prepared in tasks:
            started = time.perf_counter()
            found = evaluate_task(
                prepared, models, mesh, batch_tokens=batch_tokens, seed=BOOTSTRAP_SEED, reason_to_stop=reason_to_stop
            )
            figures[prepared.task.name] = found | {"seconds": time.perf_counter() - started}
    return figures
