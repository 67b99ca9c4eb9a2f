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
