"""Sinks: one value a step after any crash, no file of others touched, no run ended by a full disk."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_salt.errors import UserError
from megatron_salt.metrics import sinks
from tests.metrics.logs import entries, open_log, record

# --- resuming ---------------------------------------------------------------------------------------------------------


def train(path: Path, steps: Sequence[int], start_step: int, evaluate_at: Sequence[int] = (), **logging: Any) -> None:
    with open_log(path, start_step=start_step, **logging) as log:
        for step in steps:
            log.step(record(step, loss=step + start_step / 10))
            if step in evaluate_at:
                log.evaluation(step, "valid", float(step + start_step / 10), tokens=1, seconds=1.0)


def test_after_crashes_every_step_has_one_value_and_it_is_the_last_runs(tmp_path):
    train(tmp_path, range(1, 8), start_step=0, evaluate_at=(4, 6))
    train(tmp_path, range(5, 10), start_step=4, evaluate_at=(6, 8))
    train(tmp_path, range(8, 11), start_step=7, evaluate_at=(8,))
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == (
        [(step, step) for step in range(1, 5)]
        + [(step, step + 0.4) for step in range(5, 8)]
        + [(step, step + 0.7) for step in range(8, 11)]
    )
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path, "eval")] == [(4, 4), (6, 6.4), (8, 8.7)]


@pytest.mark.parametrize("torn", ['{"kind": "step", "st', '{"kind": "step", "step": 2}', "\0\0\0\0", "{}\n", "[]\n", "\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    train(tmp_path, (1, 2), start_step=0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(torn)
    train(tmp_path, (3,), start_step=2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]


def test_a_crash_while_trimming_leaves_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, (1, 2, 3), start_step=0)
    before = (tmp_path / "log.jsonl").read_bytes()

    def crash(*paths: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        sinks.drop_later_steps(tmp_path / "log.jsonl", 1)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_run_from_step_0_keeps_the_older_log_beside_its_own(tmp_path):
    train(tmp_path, (1, 2), start_step=0)
    train(tmp_path, (1,), start_step=0)
    assert len(entries(tmp_path)) == 1 and len((tmp_path / "log.jsonl.old").read_text().splitlines()) == 2


def test_a_second_run_from_step_0_keeps_both_older_logs(tmp_path):
    for last in (3, 2, 1):
        train(tmp_path, range(1, last + 1), start_step=0)
    lengths = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("log.jsonl*")}
    assert lengths == {"log.jsonl.old": 3, "log.jsonl.old2": 2, "log.jsonl": 1}


@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("content", ['{"text": "somebody\'s corpus"}\n', "one line without an end"])
def test_a_file_that_is_no_log_is_not_touched(tmp_path, content, start_step):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"--jsonl .*log.jsonl exists and is not a run's log"):
        train(tmp_path, (start_step + 1,), start_step=start_step)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"] and (tmp_path / "log.jsonl").read_text() == content


@pytest.mark.parametrize("name", ["jsonl", "tensorboard_dir"])
def test_an_unusable_path_is_refused_by_flag(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        open_log(tmp_path, **{name: str(tmp_path / "file" / "inside")})


def test_a_full_disk_does_not_end_the_run_and_loses_nothing_once_there_is_room(tmp_path, capsys):
    class FillingFile:
        """A file on a disk that takes half a line, then nothing, then everything."""

        def __init__(self) -> None:
            self.kept, self.room = b"", 50

        def write(self, data: bytes) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            taken = data[: self.room]
            self.kept, self.room = self.kept + taken, self.room - len(taken)
            return len(taken)

        def __enter__(self) -> FillingFile:
            return self

        def __exit__(self, *error: Any) -> None: ...

    disk = FillingFile()
    with open_log(tmp_path, total_steps=4) as log:
        log._sinks[0]._sink._file = disk  # type: ignore[union-attr]
        for step in (1, 2, 3):
            log.step(record(step))
        disk.room = 10**6
        log.step(record(4))
    assert [json.loads(line)["step"] for line in disk.kept.splitlines()] == [1, 2, 3, 4]
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 4
    assert output.err.count("warning: --jsonl cannot be written") == 1


# --- TensorBoard and Weights & Biases ---------------------------------------------------------------------------------


def test_tensorboard_has_one_value_a_step_after_a_crash(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = str(tmp_path / "board")
    train(tmp_path, range(1, 6), start_step=0, evaluate_at=(2,), tensorboard_dir=board)
    train(tmp_path, range(4, 7), start_step=3, tensorboard_dir=board)
    curves = EventAccumulator(board, purge_orphaned_data=True).Reload()
    names = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "valid/loss"}
    assert names <= set(curves.Tags()["scalars"])
    assert [(event.step, round(event.value, 3)) for event in curves.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4.3),
        (5, 5.3),
        (6, 6.3),
    ]
    assert [(event.step, event.value) for event in curves.Scalars("valid/loss")] == [(2, 2)]


def test_what_is_flushed_survives_a_kill_and_a_run_that_starts_over_replaces_it(tmp_path):
    """The log interval is never reached, and the log is left open, as after kill -9."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = str(tmp_path / "board")
    log = open_log(tmp_path, log_interval=100, total_steps=100, tensorboard_dir=board)
    for step in (1, 2, 3):
        log.step(record(step, loss=step))
        if step == 2:
            log.flush()
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    assert [event.step for event in EventAccumulator(board).Reload().Scalars("train/loss")] == [1, 2]
    train(tmp_path, (1,), start_step=0, tensorboard_dir=board)
    assert [entry["step"] for entry in entries(tmp_path)] == [1]
    assert [event.step for event in EventAccumulator(board).Reload().Scalars("train/loss")] == [1]


def test_curves_are_named_by_kind():
    step = {"kind": "step", "step": 3, "time": 1.0, "loss": 2.0, "nonfinite": True, "phases": {"data": 0.5}}
    assert sinks.scalars(step) == {"train/loss": 2.0, "train/nonfinite": 1.0, "time/data": 0.5}
    assert sinks.scalars(step | {"loss": 1.5, "ce": 2.0})["train/loss"] == 2.0, (
        "of the data, in both stages: no jump where a teacher goes"
    )
    assert sinks.scalars(step | {"loss": 1.5, "ce": 2.0})["train/mixed_loss"] == 1.5
    assert sinks.scalars({"kind": "eval", "step": 3, "name": "valid", "loss": 1.0}) == {"valid/loss": 1.0}
    assert sinks.scalars({"kind": "eval", "step": 3, "name": "valid/prose", "loss": 1.0}) == {"valid-prose/loss": 1.0}


@pytest.mark.parametrize("active", [True, False])
def test_every_rank_refuses_wandb_where_it_is_missing(tmp_path, monkeypatch, active):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="--wandb-project needs the package wandb, .* pip install wandb"):
        open_log(tmp_path, active=active, wandb_project="salt")


def test_wandb_gets_the_same_numbers_and_its_run_is_finished(tmp_path, monkeypatch):
    calls: list[Any] = []

    def init(**settings: Any) -> SimpleNamespace:
        calls.append((settings["project"], settings["id"], settings["resume"]))
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values["train/loss"])), finish=lambda: calls.append("finish")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    train(tmp_path, (1, 2), start_step=0, wandb_project="salt", wandb_exp_name="first")
    assert calls == [("salt", "first", "allow"), (1, 1.0), (2, 2.0), "finish"]


def test_a_wandb_id_is_the_name_where_that_is_sound_and_else_sound_and_its_own():
    assert sinks.wandb_id("first_2.8b-a") == "first_2.8b-a"
    odd = ["a 7b: lr=1e-4/x #2", "a 7b: lr=1e-4/x ?2", "é" * 200, " "]
    ids = [sinks.wandb_id(name) for name in odd]
    assert len(set(ids)) == len(odd) and all(len(one) <= 64 and not set(one) & set("/\\#?%: é") for one in ids)
    assert ids == [sinks.wandb_id(name) for name in odd]
