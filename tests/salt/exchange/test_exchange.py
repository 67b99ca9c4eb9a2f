"""The exchange of the teacher's hidden states: its memory is what start-up tells, and a block of one rank sends nothing."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_salt.config import ParallelConfig
from megatron_salt.salt.routing import ExchangePlan
from megatron_salt.salt.teacher import Teacher
from tests.support.ranks import run_ranks
from tests.support.small import SEQ_LENGTH, Case, batch, build_student
from tests.support.teaching import TEACHER, Lesson, admit, make_teacher


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, of those given and those made inside the block; and the peak of that."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in given:
            self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage.data_ptr())
        if storage.nbytes() == 0 or (known is not None and known() is not None):
            return
        self._known[storage.data_ptr()] = weakref.ref(storage)
        weakref.finalize(storage, self._add, -storage.nbytes())
        self._add(storage.nbytes())

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result


def exchanged(
    lesson: Lesson, world_size: int, stages: frozenset[int] | None = None
) -> tuple[int, int, list[Tensor | None], list[Tensor]]:
    """(peak memory of the exchange here, what the plan says of the fullest rank, hidden states, the pieces that were computed here).

    stages: of the student, those that need hidden states; None: the last one."""
    student = build_student(lesson.case, world_size)
    teacher = admit(lesson, student)
    exchange, seen = Teacher._exchange, []

    def tracked(self: Teacher, plan: ExchangePlan, outputs: list[Tensor], count: int, samples: int) -> list[Tensor | None]:
        pieces = [output.clone() for output in outputs]
        with Live(outputs) as live:
            hidden = exchange(self, plan, outputs, count, samples)
        seen.append((live.peak, plan.peak_positions * samples * TEACHER.hidden_size * 4, pieces))
        return hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "_exchange", tracked)
        hidden = teacher.hidden_states(batch(student, lesson.case, 0), lesson.merge, stages=stages)
    [(peak, planned, pieces)] = seen
    return peak, planned, hidden, pieces


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("teacher")
    run_ranks(1, make_teacher, root)
    return str(root)


@pytest.mark.parametrize("sizes, teacher_sizes, merge, stages", [
    (dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), (2, 1), 1, None),
    (dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), (1, 2), 1, frozenset({0, 1})),
    (dict(pipeline_model_parallel_size=4), (1, 2), 2, None),
    (dict(context_parallel_size=2), (1, 1), 2, None),
    ({}, (1, 1), 2, None),
])  # fmt: skip
def test_the_memory_that_start_up_tells_is_what_the_fullest_rank_takes(
    teacher: str, sizes: dict[str, int], teacher_sizes: tuple[int, int], merge: int, stages: frozenset[int] | None
) -> None:
    """Oracle: every storage that is alive during the exchange, the outputs of the teacher's forwards among them."""
    lesson = Lesson(Case(ParallelConfig(**sizes)), teacher, teacher_sizes, merge)
    ranks = run_ranks(4, exchanged, lesson, 4, stages)
    assert max(peak for peak, *_ in ranks) == ranks[0][1] > 0


def kept(lesson: Lesson) -> tuple[bool, list[bool]]:
    """Whether a block of one rank kept its hidden states without a collective, and whether an all-to-all would bring the same bits."""
    everything, calls = dist.all_to_all_single, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda *arguments, **options: calls.append(arguments))
        *_, hidden, pieces = exchanged(lesson, 2)
    outbox = torch.cat(pieces)
    inbox = torch.empty_like(outbox)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    everything(inbox, outbox, [inbox.numel()], [outbox.numel()], group=alone)
    shape = (SEQ_LENGTH, lesson.case.micro_batch_size, TEACHER.hidden_size)
    sent = [part.view(shape) for part in inbox.split(inbox.numel() // len(hidden))]
    return not calls, [mine is not None and torch.equal(mine, other) for mine, other in zip(hidden, sent, strict=True)]


@pytest.mark.parametrize("merge", [1, 2])
def test_a_block_of_one_rank_sends_nothing_to_itself(teacher: str, merge: int) -> None:
    for without, same in run_ranks(2, kept, Lesson(Case(), teacher, merge=merge)):
        assert without and len(same) == 4 and all(same)
