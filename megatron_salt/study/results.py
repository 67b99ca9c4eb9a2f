"""What a study knows of one of its runs, read from the run's own files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_salt.config import RunConfig
from megatron_salt.metrics.history import Curve

Kind = Literal["baseline", "salt", "salt_ds", "rkd", "ds_only", "random", "longer", "grow", "let", "salt_let", "gated"]
"""What an arm does. See `arms.py`."""

RunState = Literal["waiting", "running", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run of a study: an arm with one seed and one value on each axis."""

    arm: str
    """Name of the arm in STUDY.yaml"""
    kind: Kind
    seed: int
    """Runs of different arms with one seed are paired: they share initialisation and order of the data."""
    settings: Mapping[str, str]
    """{axis: value as text}; empty where the study has no axes"""
    directory: Path
    """--save of the run"""
    state: RunState
    reason: str
    """Why a run failed, or why one that waits cannot start, one line; empty for the others"""
    config: RunConfig | None
    """As the run itself wrote it; None before its first checkpoint"""
    curve: Curve | None
    """None where no step was logged"""

    @property
    def label(self) -> str:
        """Arm and settings, for tables: "salt", or "salt w=0.5"."""
        return " ".join([self.arm, *(f"{axis}={value}" for axis, value in self.settings.items())])
