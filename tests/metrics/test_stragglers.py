"""The heartbeat moves with the steps, and the report names the slowest rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_salt.metrics.stragglers import BEAT_SECONDS, Heartbeat, Slowest, StragglerReport, time_products
from tests.metrics.logs import Clock
from tests.support.program import entries, numbers, train, write_tokens
from tests.support.ranks import run_ranks


def test_the_heartbeat_moves_with_the_steps_and_is_written_at_most_every_ten_seconds(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "beat"
    heartbeat = Heartbeat(str(path), active=True, clock=clock)
    seen = []
    for step in range(1, 7):
        heartbeat.beat(step)
        seen.append(path.read_text())
        clock.now += BEAT_SECONDS / 2
    assert seen == ["1\n", "1\n", "3\n", "3\n", "5\n", "5\n"]
    assert [one.name for one in tmp_path.iterdir()] == ["beat"]


def test_other_ranks_and_runs_without_a_launcher_write_nothing(tmp_path: Path) -> None:
    Heartbeat(str(tmp_path / "beat"), active=False).beat(1)
    Heartbeat(None, active=True).beat(1)
    Heartbeat(str(tmp_path / "not there" / "beat"), active=True).beat(1)  # an error of the disk ends no run
    assert list(tmp_path.iterdir()) == []


def slow_rank_2() -> list[Any]:
    """Rank 2 calculates slowly, rank 1 reads slowly."""

    def arithmetic() -> float:
        started = time.perf_counter()
        time_products()
        time.sleep(0.2 if dist.get_rank() == 2 else 0.0)
        return time.perf_counter() - started

    report = StragglerReport(2, arithmetic)
    return [report.after_step(step, 0.5 if dist.get_rank() == 1 else 0.1) for step in (1, 2, 3, 4)]


def test_the_slowest_rank_is_named_on_every_rank_once_an_interval() -> None:
    for first, second, third, fourth in run_ranks(3, slow_rank_2):
        assert first is None and third is None
        for message, facts in (second, fourth):
            assert "slowest of 3 ranks: arithmetic rank 2 on " in message and "data rank 1 on " in message
            arithmetic, data = facts["slowest"]["arithmetic"], facts["slowest"]["data"]
            assert arithmetic["rank"] == 2 and arithmetic["seconds"] > 0.2 > arithmetic["median"] > 0
            assert data["rank"] == 1 and data["seconds"] == pytest.approx(1.0) and data["median"] == pytest.approx(0.2)


def test_slowest_of_one() -> None:
    assert Slowest.of([2.0]) == Slowest(0, 2.0, 2.0)


def test_reports_are_in_the_log_and_change_no_number(tmp_path: Path) -> None:
    flags = dict(data_path=write_tokens(tmp_path / "words"), train_iters=4, hidden_dropout=0.1)
    train(2, **flags, save=tmp_path / "watched", straggler_report_interval=2, heartbeat_file=tmp_path / "beat")
    train(2, **flags, save=tmp_path / "alone")
    reports = [entry for entry in entries(tmp_path / "watched", "event") if "slowest" in entry]
    assert [entry["step"] for entry in reports] == [2, 4]
    assert numbers(tmp_path / "watched") == numbers(tmp_path / "alone")
    assert (tmp_path / "beat").read_text() == "1\n"


def test_timing_draws_no_random_number() -> None:
    state = torch.random.get_rng_state()
    assert time_products() > 0
    assert torch.equal(torch.random.get_rng_state(), state)
