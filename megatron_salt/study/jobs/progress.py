"""How far a run is, from the end of its train.jsonl, which is read as it grows."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_salt.small_files import parse_json

RECENT = 50
"""Steps over which the step time is taken: stage 2 is faster than stage 1"""


@dataclass(frozen=True)
class Progress:
    """What a run's log tells while it runs. None: not yet."""

    step: int = 0
    held_out: float | None = None
    """Last held-out loss, nats; nan where it is not finite; of several sets, of the first one"""
    step_seconds: float | None = None
    """Mean of the last `RECENT` steps"""
    seconds: float = 0.0
    """Steps and evaluations since the log began"""
    evaluation_seconds: float = 0.0
    """Evaluations and tasks since the log began"""

    @property
    def pace(self) -> float | None:
        """Seconds that a step takes now, with its share of the evaluations so far; None before the first step."""
        return None if self.step_seconds is None else self.step_seconds + self.evaluation_seconds / max(self.step, 1)

    @property
    def mean_pace(self) -> float | None:
        """Seconds of a step over the whole log, evaluations included; None before the first step."""
        return self.seconds / self.step if self.step else None


class ProgressReader:
    """Reads one log again and again. It reads on where it was, or from the start where a resumed run has replaced the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin(None)

    def read(self) -> Progress:
        """What the log says now; the default where there is none."""
        try:
            with open(self._path, "rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._offset:
                    self._begin(state.st_ino)
                file.seek(self._offset)
                new = file.read()
        except OSError:
            self._begin(None)
            return Progress()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        mean = sum(self._recent) / len(self._recent) if self._recent else None
        return Progress(self._step, self._held_out, mean, self._step_total + self._evaluation_total, self._evaluation_total)

    def _begin(self, inode: int | None) -> None:
        self._inode, self._offset, self._step = inode, 0, 0
        self._held_out: float | None = None
        self._set: str | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._step_total = self._evaluation_total = 0.0

    def _take(self, line: bytes) -> None:
        try:
            entry: Any = parse_json(line)
            kind, seconds = entry["kind"], float(entry.get("seconds") or 0.0)
            if kind == "step":
                self._step = int(entry["step"])
                self._recent.append(seconds)
                self._step_total += seconds
            elif kind in ("eval", "task"):
                self._evaluation_total += seconds
            if kind == "eval" and "loss" in entry and self._set in (None, entry["name"]):
                self._set, loss = entry["name"], entry["loss"]
                self._held_out = float("nan") if loss is None else float(loss)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # `read_runs` tells of damaged logs
