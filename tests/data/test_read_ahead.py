"""The next step's microbatches are read in a thread: the same ones, one step ahead, and never more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Batches, Microbatch, ReadAhead
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import UserError
from tests.support.datasets import WriteDataset

LENGTH, STEP, STEPS = 8, 4, 6
THREAD = "reader of the next step"


@pytest.fixture
def batches(write_dataset: WriteDataset) -> Batches:
    """More steps than an epoch has."""
    random = np.random.default_rng(7)
    prefix = write_dataset("words", [[*random.integers(1, 100, 9).tolist(), 0] for _ in range(15)])
    train, _ = open_training_data(DataConfig(data_path=(prefix,), reset_attention_mask=True), LENGTH, 1234, 100, 0)
    return Batches(train, global_batch_size=STEP, micro_batch_size=2, replica=0, num_replicas=1)


class Watched:
    """`Batches` whose reads are noted, and that does `before` in each."""

    def __init__(self, batches: Batches, before: Callable[[int], Any] = lambda consumed: None) -> None:
        self.batches, self.before = batches, before
        self.reads: list[int] = []
        self.threads: set[str] = set()

    def fetch(self, consumed: int) -> list[Microbatch]:
        self.reads.append(consumed)
        self.threads.add(threading.current_thread().name)
        self.before(consumed)
        return self.batches.fetch(consumed)


def watched(batches: Batches, before: Callable[[int], Any] = lambda consumed: None) -> Any:
    return Watched(batches, before)


def same(one: list[Microbatch], other: list[Microbatch]) -> bool:
    return len(one) == len(other) and all(
        a is b if a is None else np.array_equal(a, b) if isinstance(a, np.ndarray) else torch.equal(a, b)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(vars(mine).values(), vars(theirs).values(), strict=True)
    )


def no_reader_is_left() -> bool:
    return not any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def following(number: int, num_steps: int = STEPS) -> int | None:
    return (number + 1) * STEP if number + 1 < num_steps else None


def test_the_microbatches_are_those_of_reading_when_they_are_needed(batches: Batches) -> None:
    """Oracle: `Batches.fetch`. Each step is read once, in the thread; nothing is read behind the last step."""
    ahead = watched(batches)
    with ReadAhead() as reader:
        for number in range(STEPS):
            assert same(reader.fetch(ahead, number * STEP, following(number)), batches.fetch(number * STEP))
            assert reader.seconds > 0
    assert ahead.reads == [number * STEP for number in range(STEPS)]
    assert [name.startswith(THREAD) for name in ahead.threads] == [True] and no_reader_is_left()


def test_a_jump_or_other_batches_drop_what_was_read_ahead(batches: Batches) -> None:
    """As at the end of stage 1: its samples, or the size of its microbatches, are no longer wanted."""
    one_by_one = batches.in_microbatches_of(1)
    with ReadAhead() as reader:
        reader.fetch(batches, 0, STEP)
        assert same(reader.fetch(one_by_one, STEP, 2 * STEP), one_by_one.fetch(STEP))
        assert same(reader.fetch(one_by_one, 5 * STEP, None), one_by_one.fetch(5 * STEP))
        assert same(reader.fetch(one_by_one, 0, None), one_by_one.fetch(0))


def test_the_next_step_is_read_while_the_caller_works(batches: Batches) -> None:
    """The read of step 2 begins and ends between the fetches of steps 1 and 2. A read is never two steps ahead."""
    done = threading.Event()
    ahead = watched(batches, lambda consumed: done.set() if consumed == STEP else None)
    with ReadAhead() as reader:
        reader.fetch(ahead, 0, STEP)
        assert done.wait(60)
        time.sleep(0.05)
        assert ahead.reads == [0, STEP]


def test_a_slow_reader_is_waited_for_and_nothing_else_changes(batches: Batches) -> None:
    go_on = threading.Event()
    slow = watched(batches, lambda consumed: go_on.wait(60) if consumed == STEP else None)
    with ReadAhead() as reader:
        assert same(reader.fetch(slow, 0, STEP), batches.fetch(0))  # the slow read holds up nobody yet
        threading.Timer(0.2, go_on.set).start()
        assert same(reader.fetch(slow, STEP, 2 * STEP), batches.fetch(STEP))
        assert reader.seconds > 0.05


def refuse(consumed: int) -> None:
    if consumed == 2 * STEP:
        raise UserError("--data-path words: token id 300 at window 7")


def test_an_error_of_a_read_comes_out_in_the_step_that_needs_it(batches: Batches) -> None:
    ahead = watched(batches, refuse)
    with ReadAhead() as reader, pytest.raises(UserError, match="token id 300 at window 7"):
        for number in range(STEPS):
            assert number < 3
            reader.fetch(ahead, number * STEP, following(number))
    assert ahead.reads == [0, STEP, 2 * STEP] and no_reader_is_left()


def test_an_error_of_a_read_that_is_never_used_is_dropped(batches: Batches) -> None:
    with ReadAhead() as reader:
        reader.fetch(watched(batches, refuse), STEP, 2 * STEP)
    assert no_reader_is_left()


def test_no_thread_is_left_when_the_caller_fails_in_the_middle_of_a_read(batches: Batches) -> None:
    begun = threading.Event()

    def read_slowly(consumed: int) -> None:
        if consumed:
            begun.set()
            time.sleep(0.2)

    with pytest.raises(ZeroDivisionError), ReadAhead() as reader:
        reader.fetch(watched(batches, read_slowly), 0, STEP)
        assert begun.wait(60)
        raise ZeroDivisionError
    assert no_reader_is_left()
