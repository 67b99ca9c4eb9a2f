"""Inside a step the host waits for the device once: for the gradient norm, which decides whether the step is applied.

Seen are the operations that need an answer from the device, or the size of one, before the host can go on. On the CPU they are the
same operations, and cost nothing.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_salt.config import ParallelConfig
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.parallel.mcore_compat import megatron_core_version
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.train.step import train_step
from tests.support import teaching
from tests.support.ranks import run_ranks
from tests.support.small import Case, batch, build_student, train_student

ANSWERS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2", "aten.is_nonzero")
SHARDED = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)


class Waits(TorchDispatchMode):
    """Collects the functions in which operations would wait. Indexing by a mask is one: the size of its result depends on the data."""

    def __init__(self, functions: tuple[str, ...]) -> None:
        """functions: their names stand for a wait; any other wait is named by operation and line."""
        super().__init__()
        self.functions, self.found = functions, set[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        by_mask = operation is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or str(operation.overloadpacket) in ANSWERS:
            stack = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            named = [frame.name for frame in stack if frame.name in self.functions]
            self.found.add(named[-1] if named else f"{operation} at {stack[-1].filename}:{stack[-1].lineno}")
        return operation(*args, **(kwargs or {}))


def waits_of_a_step(parallel: ParallelConfig, dtype: torch.dtype, teacher: Path | None) -> set[str]:
    case = Case(parallel, dtype=dtype)
    student = build_student(case, 1)
    lesson = teaching.Lesson(case, str(teacher))
    taught = None if teacher is None else teaching.admit(lesson, student)
    train_student(student, case, 1)  # what is made once is there
    microbatches = batch(student, case, 1)
    with Waits(("get_grad_norm", "finalize_model_grads")) as waits:
        train_step(student, microbatches, PhaseTimer(), taught, StepWeights(soft_labels=0.5))
    return waits.found


@pytest.mark.parametrize("parallel, dtype, taught", [(ParallelConfig(), torch.float32, False), (SHARDED, torch.bfloat16, True)])
def test_a_step_waits_for_the_gradient_norm_alone(tmp_path, parallel, dtype, taught):
    if taught:
        run_ranks(1, teaching.make_teacher, tmp_path, teaching.TEACHER, 2, dtype)
    [waits] = run_ranks(1, waits_of_a_step, parallel, dtype, tmp_path if taught else None)
    also = {"finalize_model_grads"} if megatron_core_version().startswith("0.16.") else set()  # whether any token was valid
    assert waits == {"get_grad_norm"} | also


@pytest.mark.parametrize(
    "wait",
    [lambda values: bool(values[0] > 0), lambda values: values[values > 0], torch.nonzero, lambda values: float(values.sum())],
)
def test_a_wait_is_seen(wait):
    values = torch.tensor([0.0, 1.0])
    with Waits(("test_a_wait_is_seen",)) as waits:
        values.sum().sqrt()
        assert waits.found == set()
        wait(values)
    assert waits.found == {"test_a_wait_is_seen"}
