"""The time left, by hand arithmetic; how far a run is, from its log as it grows; what a study shows."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.study.jobs.estimate import Estimate, estimate, makespan
from megatron_salt.study.jobs.live_table import LINE_SECONDS, Display, View, clock_time
from megatron_salt.study.jobs.progress import RECENT, Progress, ProgressReader
from megatron_salt.study.jobs.status import RUNNING, WAITING, Status
from tests.study.jobs.small_jobs import job

HERE = Path()
DONE = Status("done")


@pytest.mark.parametrize("at_once, expected", [
    (1, 10 + 20 + 30 + 5 + 30),
    (2, 20 + 5 + 30),  # a to 10, b to 20, c from 10 to 40, d from 20 to 25, e from 25 to 55
    (3, 10 + 30),  # e from 0 to 30
])  # fmt: skip
def test_jobs_start_in_order_when_there_is_room_and_their_needs_are_done(at_once: int, expected: float) -> None:
    seconds = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 5.0, "e": 30.0}
    needs: dict[str, tuple[str, ...]] = {"a": (), "b": (), "c": ("a",), "d": ("b", "teacher"), "e": ()}  # the teacher is done
    assert makespan(seconds, needs, [], at_once) == expected


def test_what_runs_goes_on_first() -> None:
    assert makespan({"a": 10.0, "b": 4.0}, {"a": (), "b": ()}, ["b"], 1) == 14.0
    assert makespan({"a": 10.0, "b": 4.0, "c": 7.0}, {"a": ("b",), "b": (), "c": ()}, ["b"], 2) == 14.0


def test_the_time_left_comes_from_measured_steps_of_this_study() -> None:
    jobs = [
        job(HERE, "salt 1", arm="salt", steps=100), job(HERE, "salt 2", arm="salt", steps=100),
        job(HERE, "plain 1", arm="plain", steps=100), job(HERE, "longer 1", arm="longer", steps=200),
    ]  # fmt: skip
    statuses = {"salt 1": DONE, "salt 2": WAITING, "plain 1": RUNNING, "longer 1": WAITING}
    progress = {
        "salt 1": Progress(100, 2.0, 0.5, 100.0, 20.0),  # 1 s a step over the whole run: stage 1 was slower
        "salt 2": Progress(),
        "plain 1": Progress(60, 2.0, 0.25, 30.0, 15.0),  # now 0.25 s and 15 / 60 s of evaluations
        "longer 1": Progress(),
    }
    found = estimate(jobs, statuses, progress, 2)
    mean = (100 + 30) / (100 + 60)  # no run of this arm yet: all runs of the study
    assert found.jobs == {"salt 2": 100 * 1.0, "plain 1": 40 * 0.5, "longer 1": 200 * mean}
    assert found.study == max(100.0, 20.0 + 200 * mean) and found.is_whole
    assert estimate(jobs, statuses, progress, 1).study == 20.0 + 100.0 + 200 * mean


def test_nothing_is_guessed_before_a_step_is_measured() -> None:
    jobs = [job(HERE, "score"), job(HERE, "salt", arm="salt", steps=100)]
    nothing = {"score": Progress(), "salt": Progress()}
    assert estimate(jobs, {"score": RUNNING, "salt": WAITING}, nothing, 1) == Estimate({"salt": None}, None, False)
    # the score takes an unknown time, so the study takes longer than what is known
    known = {"score": Progress(), "salt": Progress(50, None, 2.0, 100.0, 0.0)}
    assert estimate(jobs, {"score": RUNNING, "salt": WAITING}, known, 1) == Estimate({"salt": 100.0}, 100.0, False)
    assert estimate(jobs, {"score": DONE, "salt": DONE}, known, 1) == Estimate({}, 0.0, True)


# ---- progress -----------------------------------------------------------------------------------------------------------


def step(number: int, seconds: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "seconds": seconds, "loss": 2.0}


def evaluation(name: str, number: int, loss: float | None, seconds: float = 3.0) -> dict[str, Any]:
    return {"kind": "eval", "name": name, "step": number, "loss": loss, "seconds": seconds}


def text(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    reader = ProgressReader(log)
    assert reader.read() == Progress() and reader.read().pace is None
    log.write_text(
        text(evaluation("valid/a", 0, 6.0), evaluation("valid/b", 0, 7.0), step(1, 1.0), step(2, 2.0)) + '{"kind": "st'
    )
    assert reader.read() == Progress(2, 6.0, 1.5, 9.0, 6.0)
    assert reader.read().pace == 1.5 + 6.0 / 2 and reader.read().mean_pace == 4.5
    with open(log, "a") as file:
        file.write('ep", "step": 3, "seconds": 3.0}\nnonsense\n[1]\n' + text(evaluation("valid/a", 3, None)))
    found = reader.read()
    assert (found.step, found.step_seconds, found.seconds) == (3, 2.0, 15.0)
    assert found.held_out is not None and math.isnan(found.held_out)
    new = tmp_path / "new"  # a run that resumes replaces its log
    new.write_text(text(*(step(number, 1.0) for number in range(1, 41))))  # longer than what was read
    new.rename(log)
    assert reader.read() == Progress(40, None, 1.0, 40.0, 0.0)
    log.write_text(text(step(1, 1.0)))  # or cuts it back
    assert reader.read() == Progress(1, None, 1.0, 1.0, 0.0)


def test_the_step_time_is_that_of_the_last_steps(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_text(
        text(*(step(number + 1, 9.0) for number in range(10)), *(step(number + 11, 1.0) for number in range(RECENT)))
    )
    found = ProgressReader(log).read()
    assert found.step_seconds == 1.0 and found.seconds == 90.0 + RECENT


# ---- what is shown ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def view(**changes: Status) -> View:
    jobs = [
        job(HERE, "score"),
        job(HERE, "salt-seed_1", arm="salt", steps=400),
        job(HERE, "plain-seed_1", arm="plain", steps=400),
    ]
    statuses = {"score": DONE, "salt-seed_1": RUNNING, "plain-seed_1": WAITING} | {
        name.replace("_seed", "-seed"): status for name, status in changes.items()
    }
    progress = {"score": Progress(), "salt-seed_1": Progress(100, 3.25, 0.5, 50.0, 0.0), "plain-seed_1": Progress()}
    return View(jobs, statuses, progress, estimate(jobs, statuses, progress, 1))


def test_without_a_terminal_there_is_a_line_a_minute_and_one_at_each_change() -> None:
    out, now = io.StringIO(), [0.0]
    with Display(out, clock=lambda: now[0]) as display:
        display.show(view())
        display.show(view())
        assert out.getvalue().count("\n") == 1
        assert (
            "1 of 3 jobs done, 1 running, 1 waiting, about 5m50s left; salt-seed_1 step 100/400, held-out loss 3.2500"
            in out.getvalue()
        )
        assert "0.5 s a step, 2m30s left" in out.getvalue()
        now[0] = LINE_SECONDS
        display.show(view())
        assert out.getvalue().count("\n") == 2
        failed = view(salt_seed_1=Status("failed", "died: killed by SIGKILL"))
        display.show(failed)
        *_, last = out.getvalue().splitlines()
        assert last.endswith("| salt-seed_1: failed: died: killed by SIGKILL, step 100/400") and out.getvalue().count("\n") == 3
        display.end(failed, "the same command goes on")
    assert "salt-seed_1: failed: died" in out.getvalue().splitlines()[-2] and out.getvalue().endswith(
        "| the same command goes on\n"
    )


def test_on_a_terminal_there_is_a_table_with_the_running_jobs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with Display(out) as display:
        display.show(view())
        display.end(view(plain_seed_1=Status("failed", "[red]not markup[/red]")), "")
    shown = re.sub("\x1b\\[[^A-Za-z]*[A-Za-z]", "", out.getvalue())
    rows = [line.split()[:2] for line in shown.splitlines()]
    assert rows.index(["salt", "running"]) < rows.index(["plain", "waiting"]) < rows.index(["score", "done"])
    assert "plain-seed_1: failed: [red]not" in shown
    assert "100/400" in shown and "3.2500" in shown and "2m30s" in shown and "[red]not markup[/red]" in shown


@pytest.mark.parametrize("seconds, words", [(0.2, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m")])
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert clock_time(seconds) == words
