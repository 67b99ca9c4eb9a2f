"""Reads the JSONL of a run: its curves, and the end of stage 1. Pure.

`RunLog` and `sinks.Jsonl` write the file. Where a resumed run wrote a step again, the later entry counts. A line that is no entry is
counted and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.small_files import one_line, parse_json, read_small

Axis = Literal["steps", "tokens", "seconds", "flops"]
_LARGEST_LOG = 4 << 30


@dataclass(frozen=True)
class Switch:
    """The end of stage 1, as the rank that wrote the log saw it."""

    step: int
    """The last step of stage 1."""
    gib_before: float | None
    """Memory in use before the teacher was freed; None: stage 1 had a selection of the data and no teacher."""
    gib_after: float | None


@dataclass(frozen=True)
class CacheUse:
    """What a run did with --teacher-cache, all starts and ranks together. Seconds are those of threads beside the training."""

    bytes_read: int
    bytes_written: int
    seconds_reading: float
    seconds_writing: float


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
    flops: np.ndarray | None
    """float64 [n], of student and teacher since the run began; None: an earlier release wrote the log"""
    phases: dict[str, float]
    """{"data", "teacher", "forward-backward", "optimizer", "eval", "save": seconds}, sums over the log; what comes after the last step is
    not in them"""
    of_steps: dict[str, np.ndarray]
    """{"train/loss" and so on: float64 [n]}; nan where a step lacks the number"""
    of_evaluations: dict[str, dict[int, float]]
    """{"valid/loss", "valid/NAME/bits_per_byte", "task/NAME/acc" and so on: {step: value}}, in the order of the log, tasks last; nan where
    the number was not finite, and inf for a perplexity that was too large"""
    teacher: tuple[float, float] | None
    """Held-out loss and accuracy of the teacher, on the set of `held_out`"""
    switch: Switch | None
    """None: no stage 1, or it lasts to the end"""
    teacher_cache: CacheUse | None
    """None: no start of the run had a --teacher-cache, or it has not come to the end of stage 1"""
    peak_gib: float
    """Peak memory of the rank that wrote the log"""
    unread_lines: int
    """Lines that are no entry of a log: a crash cuts off at most the last one."""

    @property
    def held_out(self) -> dict[int, float]:
        """{step: held-out loss}; of several sets, on the first one."""
        return next((values for name, values in self.of_evaluations.items() if name.endswith("/loss")), {})

    @property
    def accuracy(self) -> float | None:
        """Share of held-out tokens that the model predicts, in the last evaluation; of several sets, on the first one."""
        found = next((values for name, values in self.of_evaluations.items() if name.endswith("/accuracy")), {})
        return found[max(found)] if found else None

    @property
    def is_whole(self) -> bool:
        """Whether the log begins with the run's first step. Else its tokens and seconds are those of a part."""
        return bool(self.steps[0] == 1)

    @property
    def final(self) -> float | None:
        """The last held-out loss; None where there is none."""
        return self.held_out[max(self.held_out)] if self.held_out else None

    def axis(self, x: Axis) -> np.ndarray:
        """Position of each step on the chosen axis: [n]. UserError where the log does not tell FLOPs."""
        if x == "flops" and self.flops is None:
            raise UserError(
                f"--x flops: the log of {self.name} does not tell FLOPs; an earlier release wrote it or began the run"
            )
        positions = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "flops": self.flops}[x]
        assert positions is not None
        return positions

    def when(self, x: Axis, steps: np.ndarray) -> np.ndarray:
        """Position on the chosen axis after so many steps: int [m] -> float64 [m]; 0 before the first step."""
        return np.concatenate([[0.0], self.axis(x)])[np.searchsorted(self.steps, steps, side="right")]

    @property
    def names(self) -> list[str]:
        """Names of all figures: those of evaluations first."""
        return [*self.of_evaluations, *self.of_steps]

    def figure(self, name: str) -> dict[int, float]:
        """{step: value} of a figure, ascending. UserError, with the names that there are, where the log lacks it."""
        if name in self.of_evaluations:
            return dict(sorted(self.of_evaluations[name].items()))
        if name in self.of_steps:
            return dict(zip(self.steps.tolist(), self.of_steps[name].tolist(), strict=True))
        raise UserError(
            f"--y {name} is not in the log of {self.name}{did_you_mean(name, self.names)}; it has {', '.join(self.names)}"
        )


def read_curve(name: str, path: Path) -> Curve:
    """Read a run's JSONL. UserError where it cannot be read or has no step."""
    entries, unread = _entries(path)
    steps = {entry["step"]: entry for entry in entries if entry["kind"] == "step"}  # the later of two entries
    if not steps:
        raise UserError(f"--run {name}={path} is not the log of a run: no line in it is a step")
    evaluations = [entry for entry in entries if entry["kind"] == "eval"]
    tasks = [entry for entry in entries if entry["kind"] == "task"]
    switches = [entry for entry in entries if entry["kind"] == "event" and entry.get("stage") == 2]
    cached = [entry["teacher_cache"] for entry in entries if entry["kind"] == "event" and "teacher_cache" in entry]
    try:
        rows = [steps[step] for step in sorted(steps)]
        first_set = next((entry.get("name") for entry in evaluations if "loss" in entry), None)
        taught = next((one for one in reversed(evaluations) if one.get("name") == first_set and "teacher_loss" in one), None)
        return Curve(
            name=name,
            steps=np.array([row["step"] for row in rows], np.int64),
            losses=np.array([_loss(row) for row in rows], np.float64),
            tokens=np.cumsum(np.array([int(_amount(row, "tokens")) for row in rows], np.int64)),
            seconds=np.cumsum([_amount(row, "seconds") for row in rows], dtype=np.float64),
            flops=_flops(rows),
            phases=_phases(rows),
            of_steps=_of_steps(rows),
            of_evaluations=_of_evaluations(evaluations) | _of_evaluations(tasks, "task/"),
            teacher=None if taught is None else (float(taught["teacher_loss"]), float(taught["teacher_accuracy"])),
            switch=_switch(switches[-1]) if switches else None,
            teacher_cache=_cache_use(cached) if cached else None,
            peak_gib=max(float(row["memory_gib"]) for row in rows),
            unread_lines=unread,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--run {name}={path} is not the log of a run: an entry lacks or garbles {error}") from error


_NO_FIGURES = ("kind", "time", "step", "name", "nonfinite")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_steps(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """{"train/KEY": [n]} of every number of a step."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key not in _NO_FIGURES and _is_number(value))
    found = {
        f"train/{key}": np.array([row[key] if _is_number(row.get(key)) else np.nan for row in rows], np.float64) for key in keys
    }
    return found | {"train/loss": np.array([_loss(row) for row in rows], np.float64)}


def _of_evaluations(entries: list[dict[str, Any]], prefix: str = "") -> dict[str, dict[int, float]]:
    """{"NAME/KEY": {step: value}} of every number of an evaluation; of two entries of one step the later counts.

    Raises KeyError and ValueError for an entry without a name, and for a value that is no number."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        name = entry["name"]
        if not (isinstance(name, str) and name):
            raise ValueError(f"'name' of an evaluation at step {entry['step']}: {one_line(name, 40)}")
        for key in entry:
            if key not in _NO_FIGURES:
                found.setdefault(f"{prefix}{name}/{key}", {})[entry["step"]] = _number(entry, key)
    return found


def _number(entry: dict[str, Any], key: str) -> float:
    """A number of an entry. Raises KeyError and ValueError where there is none.

    The log writes null for a number that is not finite. It is nan here, so that no earlier evaluation passes for the last one; but the
    perplexity of a finite loss can only be too large."""
    value = entry[key]
    if value is None:
        return np.inf if key == "perplexity" and _is_number(entry.get("loss")) else np.nan
    if not _is_number(value):
        raise ValueError(f"{key!r} at step {entry['step']}: {one_line(value, 40)}")
    return float(value)


def _flops(rows: list[dict[str, Any]]) -> np.ndarray | None:
    """FLOPs of student and teacher up to each step; None where a row does not tell them. ValueError where one is no amount, or the samples
    that they are for are not there."""
    if not all("student_flops" in row and row["teacher_flops"] is not None for row in rows):
        return None
    for row in rows:
        _amount(row, "consumed_samples")
    return np.array([_amount(row, "student_flops") + _amount(row, "teacher_flops") for row in rows], np.float64)


def _amount(row: dict[str, Any], key: str) -> float:
    """A number of a step from 0 to 10^30; ValueError, with the step, for anything else."""
    value = row[key]
    if not _is_number(value) or not 0 <= value <= 1e30:
        raise ValueError(f"{key!r} at step {row['step']}: {one_line(value, 40)}")
    return float(value)


def _phases(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{phase: seconds} summed over the steps; empty for a log without phases. ValueError for seconds that are no number."""
    found: dict[str, float] = {}
    for row in rows:
        for phase in row.get("phases", {}):
            found[phase] = found.get(phase, 0.0) + _number(row["phases"] | {"step": row["step"]}, phase)
    return found


def _loss(row: dict[str, Any]) -> float:
    """Cross entropy with the data. In stage 1 it is `ce`, beside `loss`, which is against the mixed target."""
    loss = _number(row, "loss")
    return _number(row, "ce") if "ce" in row else loss


def _switch(entry: dict[str, Any]) -> Switch:
    before, after = entry.get("memory_gib_before"), entry.get("memory_gib_after")
    return Switch(entry["step"], None if before is None else float(before), None if after is None else float(after))


def _cache_use(events: list[dict[str, Any]]) -> CacheUse:
    return CacheUse(
        sum(int(event["bytes_read"]) for event in events),
        sum(int(event["bytes_written"]) for event in events),
        sum(float(event["seconds_reading"]) for event in events),
        sum(float(event["seconds_writing"]) for event in events),
    )


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
        else:
            unread += 1
    return entries, unread
