"""What a run directory says: good, under way, cut off, damaged, not finite, missing, and another run's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_salt.checkpoint.owner import myself, owned
from megatron_salt.config import RunConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.study.read_runs import ExpectedRun, read_run
from megatron_salt.study.results import RunResult
from megatron_salt.train.launcher import Word, write_outcome
from tests.metrics.logs import write_run

STEPS = 6
LOSSES = [5.0, 4.0, 3.5, 3.25, 3.0, 2.75]


def run_directory(
    tmp_path: Path, losses: list[float] | None = None, held_out: float = 2.5, word: Word | None = "done", reason: str = "at its end"
) -> Path:  # fmt: skip
    """A run of six steps with an evaluation at the start and one at the end."""
    losses = LOSSES if losses is None else losses
    home = tmp_path / "run"
    write_run(home, losses, {"valid": {0: {"loss": 6.0}, len(losses): {"loss": held_out}}}).rename(home / "train.jsonl")
    if word is not None:
        write_outcome(str(home / "outcome.txt"), word, len(losses), reason)
    return home


def read(directory: Path, seed: int = 1, steps: int = STEPS) -> RunResult:
    return read_run(ExpectedRun(arm="salt", kind="salt", seed=seed, settings={"w": "0.5"}, directory=directory, steps=steps))


def write_config(directory: Path, seed: int = 1, steps: int = STEPS) -> None:
    config = RunConfig(training=TrainingConfig(seed=seed, train_iters=steps))
    checkpoint = directory / f"iter_{steps:07d}"
    checkpoint.mkdir()
    (checkpoint / "run.yaml").write_text(to_yaml(config))


def test_a_finished_run_has_its_curve_and_its_configuration(tmp_path: Path) -> None:
    home = run_directory(tmp_path)
    write_config(home)
    found = read(home)
    assert (found.state, found.reason, found.label) == ("finished", "", "salt w=0.5")
    assert found.curve is not None and found.curve.name == "salt w=0.5 seed 1" and found.curve.final == 2.5
    assert found.config is not None and found.config.training.seed == 1


def test_a_run_without_an_outcome_file_is_finished_by_its_last_step(tmp_path: Path) -> None:
    """Such as a log that was copied, or a run that was started by hand."""
    home = run_directory(tmp_path, word=None)
    assert read(home).state == "finished"
    assert read(home, steps=STEPS + 1).state == "waiting"


def test_a_run_that_has_not_begun_waits(tmp_path: Path) -> None:
    assert (read(tmp_path / "none").state, read(tmp_path / "none").curve) == ("waiting", None)
    (tmp_path / "train.jsonl").touch()
    assert read(tmp_path) == dataclasses.replace(read(tmp_path / "none"), directory=tmp_path)


def test_a_run_that_left_waits_and_one_with_an_owner_runs(tmp_path: Path) -> None:
    home = run_directory(tmp_path, LOSSES[:4], word="left", reason="SIGTERM received")
    found = read(home)
    assert (found.state, found.reason) == ("waiting", "") and found.curve is not None
    with owned(home, myself({}), take_over=False):
        assert read(home).state == "running"
    assert read(home).state == "waiting"


@pytest.mark.parametrize("word", ["refused", "died", "unsaved", "machine"])
def test_a_failed_run_tells_why_and_keeps_its_curve(tmp_path: Path, word: Word) -> None:
    found = read(run_directory(tmp_path, LOSSES[:3], word=word, reason="the disk is full"))
    assert (found.state, found.reason) == ("failed", f"{word}: the disk is full")
    assert found.curve is not None and len(found.curve.steps) == 3


@pytest.mark.parametrize("word, losses, held_out, since", [
    ("nonfinite", [5.0, math.nan, 4.0, math.nan, math.inf], 2.5, 4),
    ("nonfinite", [math.nan] * 3, math.nan, 1),
    ("done", [*LOSSES[:5], math.nan], 2.5, 6),
    ("done", LOSSES, math.nan, 6),
    ("died", [5.0, math.nan], 2.5, 2),
])  # fmt: skip
def test_a_run_that_is_not_finite_failed_at_that_step(
    tmp_path: Path, word: Word, losses: list[float], held_out: float, since: int
) -> None:
    found = read(run_directory(tmp_path, losses, held_out, word, "the gradient norm"))
    assert found.state == "failed" and found.reason.startswith(f"not finite at step {since}")
    assert found.curve is not None and len(found.curve.steps) == len(losses)


def test_numbers_that_were_not_finite_for_a_while_are_no_failure(tmp_path: Path) -> None:
    assert read(run_directory(tmp_path, [5.0, math.nan, *LOSSES[2:]])).state == "finished"


def lines(directory: Path) -> list[str]:
    return (directory / "train.jsonl").read_text().splitlines(keepends=True)


def keep(chosen: Callable[[int], bool]) -> Callable[[Path], None]:
    """Keep the entries of the steps that `chosen` wants."""

    def damage(home: Path) -> None:
        kept = [line for line in lines(home) if chosen(json.loads(line)["step"])]
        (home / "train.jsonl").write_text("".join(kept))

    return damage


def change(step: int, kind: str, /, **values: object) -> Callable[[Path], None]:
    """Give the entry of a step other values."""

    def damage(home: Path) -> None:
        entries = [json.loads(line) for line in lines(home)]
        entries = [entry | (values if (entry["step"], entry["kind"]) == (step, kind) else {}) for entry in entries]
        (home / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    return damage


@pytest.mark.parametrize("damage, reason", [
    (lambda home: (home / "train.jsonl").write_text("{garbled\n" + "".join(lines(home)[1:])), "has lines that cannot be read (1)"),
    (change(6, "eval", step="six"), "has lines that cannot be read (1)"),
    (change(3, "step", seconds=None), "lacks or garbles 'seconds' at step 3"),
    (change(3, "step", seconds=-1e9), "lacks or garbles 'seconds' at step 3"),
    (change(6, "step", consumed_samples="many"), "lacks or garbles 'consumed_samples' at step 6"),
    (change(6, "step", teacher_flops="many"), "lacks or garbles 'teacher_flops' at step 6"),
    (change(6, "step", tokens=-800), "lacks or garbles 'tokens' at step 6"),
    (lambda home: (home / "train.jsonl").unlink(), "train.jsonl is missing"),
    (keep(lambda step: step <= 4), "is cut off: it ends at step 4, and the run is done after 6"),
    (keep(lambda step: step >= 3), "begins at step 3"),
    (keep(lambda step: step not in (3, 4)), "lacks 2 of its 6 steps"),
    (lambda home: (home / "train.jsonl").write_bytes(b"\x00\xff" * 50), "no line in it is a step"),
    (lambda home: (home / "train.jsonl").write_text('{"kind": "step", "step": 1}\n'), "lacks or garbles 'loss'"),
    (lambda home: (home / "train.jsonl").unlink() or (home / "train.jsonl").mkdir(), "it is not a regular file"),
    (lambda home: (home / "iter_0000006" / "run.yaml").write_text("nonsense: ["), "run.yaml"),
    (lambda home: (home / "iter_0000006" / "run.yaml").unlink(), "run.yaml"),
])  # fmt: skip
def test_a_damaged_run_is_told_in_one_line(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    home = run_directory(tmp_path)
    write_config(home)
    damage(home)
    found = read(home)
    assert found.state == "failed" and reason in found.reason and "\n" not in found.reason and "--run" not in found.reason


def test_a_line_that_a_crash_cut_off_is_no_damage(tmp_path: Path) -> None:
    home = run_directory(tmp_path)
    with open(home / "train.jsonl", "a") as file:
        file.write('{"kind": "ste')
    assert read(home).state == "finished"


def test_another_studys_run_is_named_and_its_curve_is_not_used(tmp_path: Path) -> None:
    home = run_directory(tmp_path)
    found = read(home, steps=4)
    assert (found.state, found.curve) == ("failed", None) and "goes to step 6, and the study's run has 4" in found.reason
    write_config(home, seed=7)
    found = read(home)
    assert (found.state, found.curve) == ("failed", None) and "a run with --seed 7, and the study says 1" in found.reason
    assert "--train-iters 6, and the study says 5" in read(home, seed=7, steps=5).reason
