"""Sinks that fail: reported once, tried again after growing pauses, every entry written once and in order, never the end of a run."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_salt.errors import UserError
from megatron_salt.metrics import sinks
from megatron_salt.metrics.retrying_sink import FIRST_PAUSE, KEPT, LONGEST_PAUSE, RetryingSink
from megatron_salt.metrics.sinks import Entry
from tests.metrics.logs import Clock, entries, open_log, record


class Server:
    """Takes the entries of a sink. It answers when the clock is at `up_at` or later; before, opening and writing raise `error`."""

    def __init__(self, clock: Clock, error: Exception) -> None:
        self.clock, self.error, self.up_at = clock, error, 0.0
        self.taken: list[int] = []
        self.tries: list[float] = []
        self.opened_after: list[int] = []

    def open(self, last_step: int) -> Server:
        self.answer()
        self.opened_after.append(last_step)
        return self

    def answer(self) -> None:
        self.tries.append(self.clock.now)
        if self.clock.now < self.up_at:
            raise self.error

    name = "--server"

    def write(self, entry: Entry) -> None:
        self.answer()
        self.taken.append(entry["step"])

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Rude(Exception):
    """An exception of a library, and no OSError."""


@pytest.fixture(
    params=[OSError(errno.ENOSPC, "No space left on device"), Rude("who are you?\n  a second line"), ConnectionError("")],
    ids=lambda error: type(error).__name__,
)
def server(request: pytest.FixtureRequest) -> Server:
    return Server(Clock(), request.param)


def steps(sink: RetryingSink, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        sink.write({"kind": "step", "step": step})


@pytest.mark.parametrize("reopen", [True, False])
def test_what_came_while_a_sink_did_not_answer_is_handed_on_once_and_in_order(
    server: Server, reopen: bool, capsys: Any
) -> None:
    sink = RetryingSink("--server", server.open, 0, reopen=reopen, clock=server.clock)
    steps(sink, server.clock, 1, 3, 1.0)
    server.up_at = server.clock.now + 100
    steps(sink, server.clock, 4, 90, 1.0)
    assert server.taken == [1, 2, 3]
    steps(sink, server.clock, 91, 300, 1.0)
    sink.close()
    assert server.taken == list(range(1, 301))
    assert server.opened_after == ([0, 3] if reopen else [0])
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith("warning: --server cannot be written (")
        and lines[1] == "--server is written again"
    )


def test_one_that_does_not_open_is_opened_later(server: Server, capsys: Any) -> None:
    server.up_at = server.clock.now + 50
    sink = RetryingSink("--server", server.open, 7, reopen=False, clock=server.clock)
    steps(sink, server.clock, 8, 200, 1.0)
    sink.close()
    assert server.taken == list(range(8, 201)) and server.opened_after == [7]
    assert capsys.readouterr().err.count("warning") == 1


def test_attempts_become_rarer_up_to_a_bound(server: Server) -> None:
    sink = RetryingSink("--server", server.open, 0, reopen=False, clock=server.clock)
    server.up_at, server.tries = float("inf"), []
    steps(sink, server.clock, 1, 10_000, 1.0)
    pauses = [later - sooner for sooner, later in zip(server.tries, server.tries[1:], strict=False)]
    assert pauses[0] == FIRST_PAUSE and pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE
    assert len(server.tries) < 30


def test_what_never_arrives_is_counted_at_the_end_and_bounded_on_the_way(server: Server, capsys: Any) -> None:
    sink = RetryingSink("--server", server.open, 0, reopen=False, clock=server.clock)
    server.up_at = float("inf")
    steps(sink, server.clock, 1, KEPT + 5, 1e-3)
    assert len(sink._waiting) == KEPT
    sink.close()
    assert server.taken == [] and f"--server: {KEPT + 5} entries could not be written and are lost" in capsys.readouterr().err


def test_the_end_is_a_last_attempt_whatever_the_time(server: Server) -> None:
    server.up_at = server.clock.now + 0.5
    sink = RetryingSink("--server", server.open, 0, reopen=False, clock=server.clock)
    steps(sink, server.clock, 1, 2, 0.1)
    server.up_at = 0.0
    sink.close()
    assert server.taken == [1, 2]


def test_a_users_mistake_at_the_start_is_refused_and_later_is_a_failure_like_others() -> None:
    def refuse(_: int) -> Server:
        raise UserError("--server is a file")

    with pytest.raises(UserError, match="--server is a file"):
        RetryingSink("--server", refuse, 0, reopen=False)
    errors: list[Exception] = [OSError(errno.ENOSPC, "full"), UserError("--server is a file")]

    def fail(_: int) -> Server:
        raise errors.pop(0)

    sink = RetryingSink("--server", fail, 0, reopen=False, clock=lambda: 0.0)
    sink.write({"kind": "step", "step": 1})
    sink._next_try = 0.0
    sink.write({"kind": "step", "step": 2})
    assert not errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_run_begins_on_a_full_or_read_only_disk_and_its_log_follows_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        patched.setattr(sinks, "open", full, raising=False)
        log = open_log(tmp_path, tensorboard_dir=str(tmp_path / "board"))
        log.step(record(1))
    with log:
        log.step(record(2))
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2] and (tmp_path / "board").is_dir()
    assert capsys.readouterr().err.count("warning: ") == 2


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_may_fail_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fails: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Rude("api key not configured")

    def fine(*_: Any, **__: Any) -> None: ...

    run = SimpleNamespace(log=fail if fails == "log" else fine, finish=fail if fails == "finish" else fine)
    init = fail if fails == "init" else lambda **_: run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    with open_log(tmp_path, wandb_project="salt") as log:
        for step in (1, 2, 3):
            log.step(record(step))
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]
    err = capsys.readouterr().err
    assert err.count("warning: --wandb-project cannot be written (api key not configured)") == 1
    assert ("3 entries could not be written" in err) == (fails != "finish")
