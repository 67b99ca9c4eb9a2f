"""The log of a run: times that add up, lines and entries, no wait for the device between log steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_salt.config import LoggingConfig
from megatron_salt.metrics.run_sinks import jsonl_path, tensorboard_directory
from tests.metrics.logs import Clock, entries, open_log, record


class Late:
    """A number on a device that records whether it was read."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.read = False

    def __float__(self) -> float:
        self.read = True
        return self.value


def test_numbers_of_several_steps_and_dtypes_are_read_in_their_order(tmp_path):
    kl = [0.1, torch.tensor(1 / 3, dtype=torch.float64), torch.tensor([0.25]), torch.tensor(7)]
    with open_log(tmp_path, log_interval=4) as log:
        for number, value in enumerate(kl):
            loss = torch.tensor(1.0 + number) if number % 2 else 1.0 + number
            log.step(record(number + 1, loss=loss, nonfinite=torch.tensor(number == 2), extra={"kl": value, "ce": number}))
    read = [(entry["loss"], entry["nonfinite"], entry["kl"], entry["ce"]) for entry in entries(tmp_path)]
    assert read == [(1.0, False, 0.1, 0), (2.0, False, 1 / 3, 1), (3.0, True, 0.25, 2), (4.0, False, 7.0, 3)]


def test_a_step_is_one_line_and_one_entry(tmp_path, capsys):
    with open_log(tmp_path, total_steps=11) as log:
        log.step(record(1, loss=torch.tensor(2.5), phases=lambda: {"data": 0.1}, extra={"kl": torch.tensor(0.25)}))
    (line,) = capsys.readouterr().out.splitlines()
    parts = line.split(" | ")
    assert parts.pop(6).endswith(" GiB")
    assert parts == [
        "step 1/11",
        "loss 2.5000",
        "lr 1.000e-03",
        "grad norm 0.500",
        "1600 tokens/s",
        "0.4 TFLOP/s a rank",
        "8 samples",
        "0m05s left",
        "kl 0.25",
    ]  # 1600 tokens/s * 1e9 FLOPs / 4 ranks; 10 steps of 0.5 s
    (entry,) = entries(tmp_path)
    assert {key: entry[key] for key in entry if key not in ("time", "memory_gib")} == {
        "kind": "step",
        "step": 1,
        "consumed_samples": 8,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "nonfinite": False,
        "tokens": 800,
        "seconds": 0.5,
        "tokens_per_second": 1600.0,
        "tflops_per_rank": 0.4,
        "student_flops": 800e9,
        "teacher_flops": 0.0,
        "phases": {"data": 0.1},
        "kl": 0.25,
    }
    assert 0.01 < entry["memory_gib"] < 100


def test_the_arithmetic_of_a_teacher_counts_in_the_steps_that_have_one(tmp_path, capsys):
    with open_log(tmp_path, log_interval=2) as log:
        log.step(record(1, step_teacher_flops=5e8 * 800, teacher_flops=4e11))
        log.step(record(2, teacher_flops=4e11))
        log.step(record(3, teacher_flops=4e11))
        log.step(record(4, teacher_flops=4e11))
    assert [entry["tflops_per_rank"] for entry in entries(tmp_path)] == [
        0.6,
        0.4,
        0.4,
        0.4,
    ]  # 1600 tokens/s * (1e9 and 0.5e9) FLOPs / 4 ranks
    taught, alone = capsys.readouterr().out.splitlines()
    assert "| 0.5 TFLOP/s a rank with the teacher |" in taught and "| 0.4 TFLOP/s a rank |" in alone
    assert [(entry["student_flops"], entry["teacher_flops"]) for entry in entries(tmp_path)] == [
        (8e11 * step, 4e11) for step in (1, 2, 3, 4)
    ]


def test_model_flops_utilization_is_that_of_the_student_alone(tmp_path, capsys):
    with open_log(tmp_path, log_interval=2, peak_tflops=8.0) as log:
        log.step(record(1, step_teacher_flops=5e8 * 800))
        log.step(record(2))
    assert [entry["mfu"] for entry in entries(tmp_path)] == [0.05, 0.05]  # 0.4 of 8 TFLOP/s
    (line,) = capsys.readouterr().out.splitlines()
    assert "| MFU 5.0% | 0.5 TFLOP/s a rank with the teacher |" in line and line.count("MFU") == 1


def test_nothing_is_read_from_the_device_between_log_steps(tmp_path, capsys):
    losses, read = [Late(float(step)) for step in range(1, 8)], []

    def read_phases(step: int) -> dict[str, float]:
        read.append(step)
        return {}

    with open_log(tmp_path, log_interval=3, total_steps=7) as log:
        for step, loss in enumerate(losses, start=1):
            log.step(record(step, loss, phases=partial(read_phases, step)))
            assert [late.read for late in losses] == [number in read for number in range(1, 8)]
            assert [late.read for late in losses] == [position < step // 3 * 3 or step == 7 for position in range(7)]
            assert len(entries(tmp_path)) == (7 if step == 7 else step // 3 * 3)
    assert [entry["loss"] for entry in entries(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [
        ["step 3/7", "loss 2.0000"],
        ["step 6/7", "loss 5.0000"],
        ["step 7/7", "loss 7.0000"],
    ]


def test_a_skipped_step_is_counted_and_left_out_of_the_means(tmp_path, capsys):
    with open_log(tmp_path, log_interval=2) as log:
        log.step(record(1, math.nan, nonfinite=True))
        log.step(record(2, 3.0))
        log.step(replace(record(3, math.inf, nonfinite=True), grad_norm=math.nan))
        log.step(record(4, math.nan, nonfinite=True))
    first, second = capsys.readouterr().out.splitlines()
    assert "loss 3.0000" in first and first.endswith("1 non-finite")
    assert ("loss nan" in second or "loss inf" in second) and second.endswith("3 non-finite")
    assert [entry["loss"] for entry in entries(tmp_path)] == [None, 3.0, None, None]
    assert [entry["nonfinite"] for entry in entries(tmp_path)] == [True, False, True, True]


def test_the_time_left_follows_the_pace_with_evaluations_included(tmp_path, capsys):
    clock = Clock()
    with open_log(tmp_path, total_steps=103, clock=clock) as log:
        log.step(record(1))
        for step in (2, 3):
            clock.now += 60  # far more than the step's own half second
            log.step(record(step))
    assert "1h40m left" in capsys.readouterr().out.splitlines()[-1]


def test_an_evaluation_and_an_event_have_line_and_entry_after_the_steps_before_them(tmp_path, capsys):
    with open_log(tmp_path, log_interval=5) as log:
        log.step(record(1))
        log.evaluation(1, "valid", 2.0, tokens=640, seconds=1.5)
        log.event(1, "teacher freed", {"freed_gib": 3.5})
        log.evaluation(1, "valid", 1e9, tokens=1, seconds=0.0)
    evaluation, event, _ = capsys.readouterr().out.splitlines()
    assert evaluation == "step 1/10 | valid loss 2.0000 | perplexity 7.389 | 640 tokens in 1.5 s"
    assert event == "step 1/10 | teacher freed"
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kinds == ["step", "eval", "event", "eval"]
    assert entries(tmp_path, "eval")[0]["perplexity"] == math.exp(2) and entries(tmp_path, "event")[0]["freed_gib"] == 3.5


def test_an_inactive_rank_says_and_writes_nothing(tmp_path, capsys):
    with open_log(tmp_path / "nowhere", active=False) as log:
        log.step(record(1, Late(1.0)))
        log.evaluation(1, "valid", 2.0, tokens=640, seconds=1.5)
        log.event(1, "hello")
    assert capsys.readouterr() == ("", "") and not (tmp_path / "nowhere").exists()


def test_steps_not_yet_logged_are_written_when_the_run_fails(tmp_path):
    with pytest.raises(KeyError), open_log(tmp_path, log_interval=100) as log:
        log.step(record(1))
        raise KeyError("the run's own error")
    assert [entry["step"] for entry in entries(tmp_path)] == [1]


def test_a_device_that_died_does_not_hide_the_error_that_ends_the_run(tmp_path):
    class Dead:
        def __float__(self) -> float:
            raise RuntimeError("device lost")

    with pytest.raises(KeyError), open_log(tmp_path, log_interval=100) as log:
        log.step(record(1, Dead()))
        raise KeyError("the run's own error")
    with pytest.raises(RuntimeError, match="device lost"), open_log(tmp_path, log_interval=100) as log:
        log.step(record(1, Dead()))


def test_files_go_beside_the_checkpoints_unless_placed_and_nowhere_without_either():
    placed = LoggingConfig(jsonl="a/b.jsonl", tensorboard_dir="c")
    assert jsonl_path(placed, "save") == Path("a/b.jsonl")
    assert tensorboard_directory(placed, "save") == Path("c")
    assert jsonl_path(LoggingConfig(), "save") == Path("save/train.jsonl")
    assert tensorboard_directory(LoggingConfig(), "save") == Path("save/tensorboard")
    assert jsonl_path(LoggingConfig(), None) is None and tensorboard_directory(LoggingConfig(), None) is None
