"""When a run leaves: every rank gives the same answer, whichever rank knows the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_salt.errors import UserError
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


def plan(agree=lambda code: code, watch=None, minutes=None, interval=None, clock=Clock()) -> ExitPlan:
    return ExitPlan(
        exit_interval=interval, exit_duration_in_mins=minutes, watch=watch, agree=agree, started=1000.0, clock=clock
    )


def output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def never(code: int) -> int:
    raise AssertionError("no rank may enter a collective here")


def test_a_run_whose_save_is_taken_leaves_whichever_rank_knows() -> None:
    asked: list[int] = []

    def agree(code: int) -> int:
        asked.append(code)
        return max(code, max(asked))

    def of_rank(taken: bool) -> ExitPlan:
        leaving = plan(agree, minutes=0.0)
        leaving.leave_where(lambda: taken)
        return leaving

    assert "--exit-duration-in-mins" in (of_rank(False).reason_to_leave(1) or "")
    assert of_rank(True).reason_to_leave(2) == of_rank(False).reason_to_leave(2) == "--save was taken over"


@pytest.mark.parametrize("number", LEAVE_SIGNALS)
def test_any_number_of_signals_is_one_reason_to_leave(watch, number):
    leaving = plan(watch=watch)
    assert leaving.reason_to_leave(1) is None
    for arriving in (number, *LEAVE_SIGNALS, number):  # the first one is the reason
        os.kill(os.getpid(), arriving)
    assert [leaving.reason_to_leave(step) for step in (2, 3)] == [f"{number.name} received"] * 2


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
    assert leaving.reason_to_leave(2) == "--exit-duration-in-mins 2.0 is over"


def test_the_file_counts_for_the_rank_that_looks_and_a_signal_for_more(watch, tmp_path):
    file = tmp_path / "leave"
    looking, other = (
        ExitPlan(
            exit_interval=None,
            exit_duration_in_mins=None,
            watch=watch,
            agree=lambda code: code,
            started=0.0,
            exit_file=str(file),
            looks=looks,
        )
        for looks in (True, False)
    )
    assert looking.reason_to_stop_now() is None
    file.symlink_to("nowhere")  # whatever it is
    assert looking.reason_to_leave(1) == looking.reason_to_stop_now() == f"--exit-file {file} has appeared"
    assert other.reason_to_leave(1) is None  # it would hear of it: agree is the maximum over ranks
    with pytest.raises(UserError, match=f"--exit-file {file} is there"):
        refuse_exit_file(str(file))
    os.kill(os.getpid(), signal.SIGTERM)
    assert looking.reason_to_leave(1) == other.reason_to_leave(1) == "SIGTERM received" and file.is_symlink()


def test_the_interval_needs_no_collective():
    leaving = plan(agree=never, interval=3)
    assert [step for step in range(1, 10) if leaving.reason_to_leave(step)] == [3, 6, 9]
    assert leaving.reason_to_leave(6) == "step 6 is a multiple of --exit-interval 3"
    assert plan(agree=never).reason_to_leave(1) is None


@pytest.mark.parametrize(
    "received", [(0, 0, 0), (0, signal.SIGTERM, 0), (signal.SIGUSR1, 0, signal.SIGTERM), (signal.SIGUSR1,) * 3]
)
@pytest.mark.parametrize("times", [(0.0, 0.0, 0.0), (0.0, 61.0, 0.0)])
@pytest.mark.parametrize("step", [4, 5])
def test_ranks_that_know_different_things_give_the_same_answer(monkeypatch, received, times, step):
    """Oracle: the maximum over the codes that the ranks offer when each is asked alone."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    offered: list[int] = []

    def offer(code: int) -> int:
        offered.append(code)
        return code

    def ranks(agree) -> list[str | None]:
        answers = []
        for number, seconds in zip(received, times, strict=True):
            watch, clock = SignalWatch(), Clock()
            watch.received, clock.now = number, 1000.0 + seconds
            answers.append(plan(agree, watch, minutes=1.0, interval=5, clock=clock).reason_to_leave(step))
        return answers

    alone = ranks(offer)
    agreed = ranks(lambda code: max(offered))
    assert len(offered) == 3 and len(set(agreed)) == 1
    assert (agreed[0] is None) == (not any(received) and not any(times) and step != 5)
    assert agreed[0] in alone


def test_signals_are_caught_before_the_slow_imports():
    code = (
        "import os, signal, sys; from megatron_salt.train.exit import SignalWatch; watch = SignalWatch(); "
        "os.kill(os.getpid(), signal.SIGUSR1); print(watch.received == signal.SIGUSR1, 'torch' in sys.modules)"
    )
    assert output_of(code) == "True False\n"
