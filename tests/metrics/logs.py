"""A run log with small numbers, for the tests of what it prints and of where it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_salt.config import LoggingConfig
from megatron_salt.metrics.run_log import RunLog, StepRecord


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(step: int, loss: Any = 2.0, **values: Any) -> StepRecord:
    return StepRecord(
        step=step, consumed_samples=8 * step, loss=loss, lr=1e-3, grad_norm=0.5, tokens=800, seconds=0.5, **values
    )


def open_log(
    path: Path,
    start_step: int = 0,
    total_steps: int = 10,
    active: bool = True,
    clock: Any = None,
    peak_tflops: float | None = None,
    **logging: Any,
) -> RunLog:
    logging = {"jsonl": str(path / "log.jsonl")} | logging
    return RunLog(
        LoggingConfig(**logging),
        active=active,
        save=None,
        start_step=start_step,
        total_steps=total_steps,
        flops_per_token=1e9,
        seq_length=100,
        peak_tflops=peak_tflops,
        world_size=4,
        config={"model": {}},
        clock=clock or Clock(),
    )


def entries(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if entry["kind"] == kind]


def write_run(
    directory: Path,
    losses: list[float],
    evaluations: dict[str, dict[int, dict[str, float]]],
    *,
    teacher_steps: int = 0,
    seconds: float = 0.5,
) -> Path:
    """The log of a run whose steps take `seconds` each, with a teacher of half the student's FLOPs in the first steps.

    evaluations: {name of a set: {step: figures, "loss" among them}}."""
    directory.mkdir()
    with open_log(directory, total_steps=len(losses)) as log:
        for step in range(len(losses) + 1):
            if step:
                flops = 4e11 * min(step, teacher_steps)
                log.step(replace(record(step, losses[step - 1], teacher_flops=flops), seconds=seconds))
            for name, found in evaluations.items():
                if step in found:
                    beside = {key: value for key, value in found[step].items() if key != "loss"}
                    log.evaluation(step, name, found[step]["loss"], tokens=1000, seconds=1.0, beside=beside)
    return directory / "log.jsonl"


def write_log(path: Path, losses: list[float], held_out: dict[int, float] | None = None) -> Path:
    """Write a run's log with 800 tokens and half a second for each step."""
    path.mkdir()
    with open_log(path, total_steps=len(losses)) as log:
        log.event(0, "begins")
        for step, loss in enumerate(losses, start=1):
            log.step(record(step, loss))
            if held_out and step in held_out:
                log.evaluation(step, "valid", held_out[step], tokens=1000, seconds=1.0)
    return path / "log.jsonl"


def write_taught_log(path: Path, losses: list[float], kd_steps: int, held_out: dict[int, float]) -> Path:
    """Write the log of a run with a teacher. Its mixed loss is 1 above the cross entropy with the data."""
    path.mkdir()
    teacher = {"teacher_loss": 3.5, "teacher_accuracy": 0.25}
    with open_log(path, total_steps=len(losses)) as log:
        for step, loss in enumerate(losses, start=1):
            taught = step <= kd_steps
            if step == kd_steps + 1:
                log.event(kd_steps, "stage 2", {"stage": 2, "memory_gib_before": 2.5, "memory_gib_after": 2.25})
            extra = {"kd_weight": 0.5, "ce": loss, "kl": 1.0, "teacher_ce": 3.5, "agreement": 0.5} if taught else {}
            log.step(record(step, loss + taught, extra=extra))
            if step in held_out:
                beside = {"accuracy": 0.01 * step} | (teacher if taught else {})
                log.evaluation(step, "valid", held_out[step], tokens=1000, seconds=1.0, beside=beside)
    return path / "log.jsonl"
