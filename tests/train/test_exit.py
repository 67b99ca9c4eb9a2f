"""When a run leaves: every rank gives the same answer, whichever rank knows the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from megatron_salt.errors import LeftEarly, UserError
from megatron_salt.train.exit import LEAVE_SIGNALS, ExitPlan, SignalWatch, refuse_exit_file


@pytest.fixture
def watch() -> Iterator[SignalWatch]:
    watch = SignalWatch()
    yield watch
    watch.restore()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def alone(code: int) -> Callable[[], int]:
    """A rank without others: its own code is the largest."""
    return lambda: code


def plan(begin=alone, watch=None, minutes=None, interval=None, clock=Clock(), **file) -> ExitPlan:
    return ExitPlan(
        exit_interval=interval,
        exit_duration_in_mins=minutes,
        watch=watch,
        begin=begin,
        started=1000.0,
        clock=clock,
        **file,
    )


class Ranks:
    """The codes that ranks offered, in the order of the questions."""

    def __init__(self, num_ranks: int) -> None:
        self.offered: list[list[int]] = [[] for _ in range(num_ranks)]

    def begin_on(self, rank: int) -> Callable[[int], Callable[[], int]]:
        def begin(code: int) -> Callable[[], int]:
            question = len(self.offered[rank])
            self.offered[rank].append(code)
            return lambda: max(codes[question] for codes in self.offered)

        return begin


def output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def never(code: int) -> Callable[[], int]:
    raise AssertionError("no rank may enter a collective here")


def test_a_run_whose_save_is_taken_leaves_whichever_rank_knows() -> None:
    ranks = Ranks(2)
    leaving = [plan(ranks.begin_on(rank), minutes=0.0) for rank in range(2)]
    taken = [False, False]
    for one, knows in zip(leaving, (0, 1), strict=True):
        one.leave_where(lambda knows=knows: taken[knows])
    taken[1] = True
    assert [one.reason_to_leave(1) for one in leaving] == [None, None]
    assert [one.reason_to_leave(2) for one in leaving] == ["--save was taken over"] * 2  # before the time limit


def test_no_rank_waits_for_an_answer_in_the_step_in_which_it_asks() -> None:
    """The answer to each question is read once, after the next step. What is under way at the end is read by `finish`."""
    events: list[str] = []

    def begin(code: int) -> Callable[[], int]:
        number = sum(event.startswith("ask") for event in events)
        events.append(f"ask {number}")

        def answer() -> int:
            events.append(f"read {number}")
            return code

        return answer

    leaving = plan(begin, minutes=60.0)
    assert [leaving.reason_to_leave(step) for step in (1, 2)] == [None, None]
    assert leaving.reason_to_stop_now() is None  # before a batch of an evaluation
    leaving.finish()
    leaving.finish()
    assert events == ["ask 0", "read 0", "ask 1", "read 1", "ask 2", "read 2"]


def test_after_a_reason_nothing_more_is_asked() -> None:
    ranks = Ranks(1)
    leaving = plan(ranks.begin_on(0), minutes=0.0)
    answers = [leaving.reason_to_leave(1), leaving.reason_to_leave(2), leaving.reason_to_stop_now()]
    assert answers == [None, *["--exit-duration-in-mins 0.0 is over"] * 2]
    leaving.finish()
    assert len(ranks.offered[0]) == 1


@pytest.mark.parametrize("number", LEAVE_SIGNALS)
def test_any_number_of_signals_is_one_reason_to_leave(watch, number):
    leaving = plan(watch=watch)
    assert leaving.reason_to_leave(1) is None
    for arriving in (number, *LEAVE_SIGNALS, number):  # the first one is the reason
        os.kill(os.getpid(), arriving)
    assert [leaving.reason_to_leave(step) for step in (2, 3, 4)] == [None, *[f"{number.name} received"] * 2]


def test_the_previous_handlers_come_back():
    before = [signal.getsignal(number) for number in LEAVE_SIGNALS]
    watch = SignalWatch()
    assert [signal.getsignal(number) for number in LEAVE_SIGNALS] != before
    watch.restore()
    assert [signal.getsignal(number) for number in LEAVE_SIGNALS] == before


@pytest.mark.parametrize("number", LEAVE_SIGNALS)
def test_a_forked_child_dies_of_the_signal(number):
    """A background writer that its parent terminates must not live on. In another Python process, because this one has threads."""
    code = (
        "import os; from megatron_salt.train.exit import SignalWatch; watch = SignalWatch(); child = os.fork()\n"
        f"if child == 0: os.kill(os.getpid(), {number}); os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), watch.received)"
    )
    assert output_of(code) == f"{-number} 0\n"


def test_the_time_limit_counts_from_the_start_of_the_program():
    clock = Clock()
    leaving = plan(minutes=2.0, clock=clock)
    clock.now = 1119.9
    assert leaving.reason_to_leave(1) is None
    clock.now = 1120.0
    assert leaving.reason_to_leave(2) is None
    assert leaving.reason_to_leave(3) == "--exit-duration-in-mins 2.0 is over"


def test_the_file_counts_for_the_rank_that_looks_and_a_signal_for_more(watch, tmp_path):
    file = tmp_path / "leave"
    ranks = Ranks(2)
    looking, other = (plan(ranks.begin_on(rank), watch, exit_file=str(file), looks=rank == 0) for rank in range(2))
    assert looking.reason_to_leave(1) is other.reason_to_leave(1) is None
    file.symlink_to("nowhere")  # whatever it is
    assert looking.reason_to_leave(2) is other.reason_to_leave(2) is None
    assert looking.reason_to_leave(3) == other.reason_to_stop_now() == f"--exit-file {file} has appeared"
    assert ranks.offered[1] == [0, 0]  # it heard of it
    with pytest.raises(UserError, match=f"--exit-file {file} is there"):
        refuse_exit_file(str(file))
    os.kill(os.getpid(), signal.SIGTERM)
    again = plan(alone, watch, exit_file=str(file))
    assert again.reason_to_leave(1) is None
    assert again.reason_to_leave(2) == "SIGTERM received" and file.is_symlink()


@pytest.mark.parametrize("timed", [False, True])
def test_before_the_first_step_ranks_wait_for_the_answer_and_the_time_limit_does_not_count(watch, timed):
    leaving = plan(alone, watch, minutes=0.0 if timed else None)
    leaving.look("reading the data")
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(LeftEarly, match="SIGTERM received while building the model"):
        leaving.look("building the model")


def test_the_interval_needs_no_collective():
    leaving = plan(never, interval=3)
    assert [step for step in range(1, 10) if leaving.reason_to_leave(step)] == [3, 6, 9]
    assert leaving.reason_to_leave(6) == "step 6 is a multiple of --exit-interval 3"
    assert plan(never).reason_to_leave(1) is None


@pytest.mark.parametrize(
    "received", [(0, 0, 0), (0, signal.SIGTERM, 0), (signal.SIGUSR1, 0, signal.SIGTERM), (signal.SIGUSR1,) * 3]
)
@pytest.mark.parametrize("times", [(0.0, 0.0, 0.0), (0.0, 61.0, 0.0)])
@pytest.mark.parametrize("step", [3, 5])
def test_ranks_that_know_different_things_give_the_same_answer(monkeypatch, received, times, step):
    """Oracle: the maximum over the codes that the ranks offer when each is asked alone."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def answers(ranks: list[Ranks], place: list[int]) -> list[str | None]:
        """What each rank says after `step`: rank i is rank place[i] of the world ranks[i]."""
        plans = []
        for world, rank, number, seconds in zip(ranks, place, received, times, strict=True):
            watch, clock = SignalWatch(), Clock()
            watch.received, clock.now = number, 1000.0 + seconds
            plans.append(plan(world.begin_on(rank), watch, minutes=1.0, interval=5, clock=clock))
        assert [one.reason_to_leave(step - 1) for one in plans] == [None] * 3
        return [one.reason_to_leave(step) for one in plans]

    apart = [Ranks(1) for _ in received]
    alone = answers(apart, [0, 0, 0])
    together = Ranks(3)
    agreed = answers([together] * 3, [0, 1, 2])
    assert [codes[0] for codes in together.offered] == [world.offered[0][0] for world in apart]
    assert len(set(agreed)) == 1
    assert (agreed[0] is None) == (not any(received) and not any(times) and step != 5)
    assert agreed[0] in alone


def test_signals_are_caught_before_the_slow_imports():
    code = (
        "import os, signal, sys; from megatron_salt.train.exit import SignalWatch; watch = SignalWatch(); "
        "os.kill(os.getpid(), signal.SIGUSR1); print(watch.received == signal.SIGUSR1, 'torch' in sys.modules)"
    )
    assert output_of(code) == "True False\n"
