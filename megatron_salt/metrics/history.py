"""Reads the JSONL of a run: its curves, and the end of stage 1. Pure.

`RunLog` and `sinks.Jsonl` write the file. Where a resumed run wrote a step again, the later entry counts. A line that is not JSON is
counted and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.small_files import parse_json, read_small

Axis = Literal["steps", "tokens", "seconds"]
_LARGEST_LOG = 4 << 30


@dataclass(frozen=True)
class Switch:
    """The end of stage 1, as the rank that wrote the log saw it."""

    step: int
    """The last step of stage 1."""
    gib_before: float | None
    """Memory in use before the teacher was freed; None: stage 1 had a selection of the data and no teacher."""
    gib_after: float | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The curves of one run. Losses are nats a token; a step without a finite loss has nan."""

    name: str
    steps: np.ndarray
    """int64 [n], ascending"""
    losses: np.ndarray
    """float64 [n], training loss: cross entropy with the data"""
    tokens: np.ndarray
    """int64 [n], read since the log began"""
    seconds: np.ndarray
    """float64 [n], sum of the step times since the log began; evaluations and saves do not count"""
    held_out: dict[int, float]
    """{step: held-out loss}"""
    accuracy: float | None
    """Share of held-out tokens that the model predicts, in the last evaluation"""
    teacher: tuple[float, float] | None
    """Held-out loss and accuracy of the teacher"""
    switch: Switch | None
    """None: no stage 1, or it lasts to the end"""
    peak_gib: float
    """Peak memory of the rank that wrote the log"""
    unread_lines: int
    """Lines that are not JSON: a crash cuts off at most the last one."""

    @property
    def final(self) -> float | None:
        """The last held-out loss; None where there is none."""
        return self.held_out[max(self.held_out)] if self.held_out else None

    def axis(self, x: Axis) -> np.ndarray:
        """Position of each step on the chosen axis: [n]."""
        return {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}[x]


def read_curve(name: str, path: Path) -> Curve:
    """Read a run's JSONL. UserError where it cannot be read or has no step."""
    entries, unread = _entries(path)
    steps = {entry["step"]: entry for entry in entries if entry["kind"] == "step"}  # the later of two entries
    if not steps:
        raise UserError(f"--run {name}={path} is not the log of a run: no line in it is a step")
    evaluations = {entry["step"]: entry for entry in entries if entry["kind"] == "eval"}
    switches = [entry for entry in entries if entry["kind"] == "event" and entry.get("stage") == 2]
    try:
        rows = [steps[step] for step in sorted(steps)]
        last = evaluations[max(evaluations)] if evaluations else {}
        taught = next((entry for entry in reversed(evaluations.values()) if "teacher_loss" in entry), None)
        return Curve(
            name=name,
            steps=np.array([row["step"] for row in rows], np.int64),
            losses=np.array([_loss(row) for row in rows], np.float64),
            tokens=np.cumsum(np.array([int(row["tokens"]) for row in rows], np.int64)),
            seconds=np.cumsum([row["seconds"] for row in rows], dtype=np.float64),
            held_out={step: float(entry["loss"]) for step, entry in evaluations.items() if entry["loss"] is not None},
            accuracy=None if last.get("accuracy") is None else float(last["accuracy"]),
            teacher=None if taught is None else (float(taught["teacher_loss"]), float(taught["teacher_accuracy"])),
            switch=_switch(switches[-1]) if switches else None,
            peak_gib=max(float(row["memory_gib"]) for row in rows),
            unread_lines=unread,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--run {name}={path} is not the log of a run: an entry lacks or garbles {error}") from error


def _loss(row: dict[str, Any]) -> float:
    """Cross entropy with the data. In stage 1 it is `ce`, beside `loss`, which is against the mixed target."""
    loss = row.get("ce", row["loss"])
    return np.nan if loss is None else float(loss)


def _switch(entry: dict[str, Any]) -> Switch:
    before, after = entry.get("memory_gib_before"), entry.get("memory_gib_after")
    return Switch(entry["step"], None if before is None else float(before), None if after is None else float(after))


def _entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    entries, unread = [], 0
    try:
        lines = read_small(path, _LARGEST_LOG).splitlines()
    except OSError as error:
        raise UserError(f"--run {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--run {path} cannot be read: {error}") from None
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            unread += 1
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry:
            entries.append(entry)
    return entries, unread
