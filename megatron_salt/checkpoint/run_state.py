"""How far a run is: what a checkpoint holds beside tensors so that the run can go on from there. JSON values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

EVALUATION_DUE = "evaluation_due"
"""In Progress.extra: the evaluation after its step is still to come. It may decide a crossover, so a resumed run begins with it."""


@dataclass(frozen=True)
class SaltProgress:
    """Where a run with a stage 1 is. Kept to the end of the run, also when the teacher is long gone."""

    stage1_end: int
    """Last step of stage 1: --kd-steps, or earlier after a crossover."""
    schedule: dict[str, Any]
    """Values of the kd flags that shape the mathematics, by field name (`Schedule.facts`)."""
    teacher: str | None
    """Fingerprint of the teacher's checkpoint; None: stage 1 has a selection of the data and no teacher."""
    teacher_directory: str | None
    """Where it lay when the run began. For people."""
    crossover: int | None = None
    """Step after which the student was found to have passed the teacher."""
    teacher_held_out: dict[str, float] | None = None
    """The frozen teacher's figures on the held-out data, once they are known: "loss" and "accuracy"."""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any] | None) -> Self | None:
        """What asdict gave, from JSON."""
        return None if facts is None else cls(**facts)

    def stage_after(self, step: int) -> int:
        """1 or 2: the stage of the step that follows `step` steps."""
        return 1 if step < self.stage1_end else 2

    def resumes_in(self, step: int, evaluation_due: bool) -> int:
        """The stage in which a run resumed after `step` steps begins: an evaluation that is due at the end of stage 1 is part of it."""
        return 1 if evaluation_due and step == self.stage1_end else self.stage_after(step)


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    consumed_samples: int
    data: dict[str, Any] = field(default_factory=dict)
    """Samples drawn, "position", and in stage 2 of a run with a selection how many of them stage 1 had drawn, "stage2_since"; empty:
    the data starts at its beginning."""
    events: tuple[dict[str, Any], ...] = ()
    """What happened to the run and must be remembered, such as a change of data."""
    extra: dict[str, Any] = field(default_factory=dict)
    salt: SaltProgress | None = None
    """None: a run without a stage 1."""

    @property
    def evaluation_due(self) -> bool:
        """Whether the evaluation after the step is still to come."""
        return bool(self.extra.get(EVALUATION_DUE, False))
