"""How strongly the teacher teaches at each step, and where stage 1 ends.

Steps count from 1. Stage 1 is steps 1 to E, its end: --kd-steps, or earlier after a crossover, a fact that the checkpoint keeps.
E beyond the run is allowed: the teacher teaches to the end (RKD in the paper). Pure: the same answer on every rank and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from megatron_salt.config import SaltConfig


@dataclass(frozen=True)
class Schedule:
    """The flags of stage 1 that shape the mathematics. Saved in every checkpoint of a run with a teacher."""

    kd_steps: int
    kd_weight: float
    kd_teacher_temperature: float
    kd_transition: str
    kd_transition_steps: int
    kd_stop: str
    kd_stop_margin: float

    @classmethod
    def of(cls, salt: SaltConfig) -> Self:
        """The schedule of a run that has a stage 1."""
        assert salt.kd_steps is not None, salt
        return cls.from_facts(asdict(salt))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """What `facts` gave, read back from a checkpoint."""
        return cls(*(facts[field.name] for field in fields(cls)))

    def facts(self) -> dict[str, Any]:
        """Values by the names of their flags, plain enough for JSON."""
        return asdict(self)

    def in_stage1(self, step: int, stage1_end: int) -> bool:
        """Whether the teacher is still there, whatever its weight."""
        assert step >= 1, step
        return step <= stage1_end

    def at(self, step: int, stage1_end: int) -> float:
        """The teacher's weight w in the loss of a step. With K transition steps the fade's j-th step has factor 1 - j / (K + 1)."""
        assert step >= 1, step
        faded = step - (stage1_end - self.kd_transition_steps)  # j, the number of a step of the fade
        # 1) distil at full weight
        if faded <= 0:
            return self.kd_weight
        # 2) fade
        if step <= stage1_end:
            factor = 1 - faded / (self.kd_transition_steps + 1)
            if self.kd_transition == "linear":
                return self.kd_weight * factor
            ratio = self.kd_weight / (1 - self.kd_weight) * factor
            return ratio / (1 + ratio)
        # 3) train alone
        return 0.0

    def stage1_end_after(self, crossover_step: int) -> int:
        """The end of stage 1 where the student is first found, after a step, to have passed the teacher: the fade still takes place."""
        return min(self.kd_steps, crossover_step + self.kd_transition_steps)
