"""The teacher's weights and its temperature at each step, the end of stage 1, and whether a resumed run may go on under these flags.

Steps count from 1. Stage 1 is steps 1 to E, its end: --kd-steps, or earlier after a crossover, a fact that the checkpoint keeps. With
hidden-state guidance it lasts to --let-steps too: the teacher teaches while either lasts.
E beyond the run is allowed: the teacher teaches to the end (RKD in the paper). Pure: the same answer on every rank and after a resume.

A run that was left in stage 1 goes on with the same teacher and schedule, or not at all. One that was left in stage 2 needs neither.
Only --override-kd-schedule changes the schedule, and the change is recorded. Stage 1 may have a selection of the data and no teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Self

from megatron_salt.checkpoint.run_state import RunState, SaltState
from megatron_salt.config import SaltConfig, flag
from megatron_salt.config.teaching import REPLACED_BY, gate_text, parse_temperatures, parse_weights, schedule_text, value_at
from megatron_salt.errors import UserError

log = logging.getLogger(__name__)

Events = tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """Weights of what the teacher teaches in a step."""

    soft_labels: float | None = None
    """w, the weight of its distribution. None: it gives no soft labels in this step, and its output layer is not computed."""
    temperature: float | None = None
    """T of its soft labels by --kd-temperature-schedule. None: --kd-teacher-temperature."""
    hidden: float | None = None
    """lambda, the weight of hidden-state guidance. None: it guides no layer in this step."""


PLAIN = StepWeights()
"""Of a step without a teacher."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The flags of stage 1 that change the loss. Saved in every checkpoint of a run with a stage 1."""

    kd_steps: int
    """0 where the teacher gives no soft labels."""
    kd_weight: float
    kd_teacher_temperature: float
    kd_transition: str
    kd_transition_steps: int
    kd_stop: str
    kd_stop_margin: float
    guide: str = "soft-labels"
    let_weight: float = 0.1
    let_layer: int = 3
    let_steps: int | None = None
    let_decay: str = "linear"
    kd_gate: str = "none"
    kd_weight_schedule: str = ""
    """The entries of the flag, with spaces between them. Empty: not given."""
    kd_temperature_schedule: str = ""
    """Likewise."""

    @classmethod
    def of(cls, salt: SaltConfig) -> Self:
        """The schedule of a run that has a stage 1."""
        assert salt.stage1_steps is not None, salt
        texts = {
            "kd_gate": gate_text(salt.kd_gate),
            "kd_weight_schedule": schedule_text(parse_weights(salt.kd_weight_schedule)),
            "kd_temperature_schedule": schedule_text(parse_temperatures(salt.kd_temperature_schedule)),
        }
        unused = {name: SaltConfig.__dataclass_fields__[name].default for name, text in REPLACED_BY.items() if texts[text]}
        return cls.from_facts(asdict(salt) | {"kd_steps": salt.kd_steps or 0} | texts | unused)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """The schedule that a checkpoint holds, as `facts` gave it."""
        return cls(
            **{field.name: facts[field.name] for field in fields(cls) if field.name in facts or field.default is MISSING}
        )

    def facts(self) -> dict[str, Any]:
        """Values by field name, as JSON takes them. Without hidden-state guidance nothing of it, as before there was any; gate and lists
        of steps likewise."""
        guided = self.guide != "soft-labels"
        return {
            name: value for name, value in asdict(self).items()
            if name not in _DEFAULTS or (guided if name in _GUIDANCE else value != _DEFAULTS[name])
        }  # fmt: skip

    @property
    def stage1_steps(self) -> int:
        """Last step of stage 1, unless a crossover comes before."""
        return max(self.kd_steps, self.let_steps or 0)

    def in_stage1(self, step: int, stage1_end: int) -> bool:
        """Whether a step belongs to stage 1, whatever the teacher's weight."""
        assert step >= 1, step
        return step <= stage1_end

    def at(self, step: int, stage1_end: int) -> float:
        """The weight w of soft labels in the loss of a step. With K transition steps the fade's j-th step has factor 1 - j / (K + 1)."""
        assert step >= 1, step
        end = min(stage1_end, self.kd_steps)
        faded = step - (end - self.kd_transition_steps)  # j, the number of the step within the fade
        full = self.kd_weight
        if self.kd_weight_schedule:
            full = value_at(parse_weights(self.kd_weight_schedule.split()), step)
        # 1) distil at full weight
        if faded <= 0:
            return full
        # 2) fade
        if step <= end:
            factor = 1 - faded / (self.kd_transition_steps + 1)
            if self.kd_transition == "linear":
                return full * factor
            ratio = full / (1 - full) * factor
            return ratio / (1 + ratio)
        # 3) train alone
        return 0.0

    def temperature_at(self, step: int) -> float:
        """The temperature of the teacher's soft labels at a step."""
        if not self.kd_temperature_schedule:
            return self.kd_teacher_temperature
        return value_at(parse_temperatures(self.kd_temperature_schedule.split()), step)

    def let_weight_at(self, step: int) -> float:
        """The weight lambda of hidden-state guidance in the loss of a step; 0 without guidance."""
        assert step >= 1, step
        if self.let_steps is None or step > self.let_steps:
            return 0.0
        return self.let_weight if self.let_decay == "step" else self.let_weight * (1 - (step - 1) / self.let_steps)

    def weights_at(self, step: int, stage1_end: int) -> StepWeights:
        """What the teacher teaches in a step, and with which weights. A weight of 0 inside its steps is a weight."""
        guides = self.let_steps is not None and step <= self.let_steps
        labels = step <= min(stage1_end, self.kd_steps)
        return StepWeights(
            soft_labels=self.at(step, stage1_end) if labels else None,
            temperature=self.temperature_at(step) if labels and self.kd_temperature_schedule else None,
            hidden=self.let_weight_at(step) if guides else None,
        )

    def stage1_end_after(self, crossover_step: int) -> int:
        """The end of stage 1 where the student passes the teacher after `crossover_step`. The fade still takes place."""
        return min(self.kd_steps, crossover_step + self.kd_transition_steps)


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Schedule) if field.default is not MISSING}
"""Facts of a schedule without hidden-state guidance, gate and lists of steps. Checkpoints of such runs do not hold them."""
_GUIDANCE = {name for name in _DEFAULTS if name == "guide" or name.startswith("let_")}


def lowest_temperature(salt: SaltConfig) -> float:
    """The lowest temperature of any step. Differences between logits count most there."""
    points = parse_temperatures(salt.kd_temperature_schedule)
    return min(value for _, value in points) if points else salt.kd_teacher_temperature


def checked_temperatures(salt: SaltConfig) -> tuple[float, ...]:
    """Temperatures at which the teacher's distribution is checked before step 1: the lowest and the highest of any step, and 1."""
    points = parse_temperatures(salt.kd_temperature_schedule)
    highest = max((value for _, value in points), default=salt.kd_teacher_temperature)
    return tuple(dict.fromkeys((lowest_temperature(salt), highest, 1.0)))


def is_tempered(salt: SaltConfig) -> bool:
    """Whether the temperature of some step is not 1."""
    points = parse_temperatures(salt.kd_temperature_schedule)
    return any(value != 1 for _, value in points) if points else salt.kd_teacher_temperature != 1


def salt_at_start(
    resumed: RunState | None, schedule: Schedule | None, teacher: str | None, directory: str | None, override: bool
) -> tuple[SaltState | None, Events]:
    """The state of SALT with which a start begins, and the events to record. Raises UserError, naming both sides.

    resumed: what the checkpoint says; None for a run from step 0 (--finetune too). schedule: of the flags; None without --kd-steps.
    directory: --teacher-load; None without it. teacher: the fingerprint of the checkpoint there; None where none was read.
    override: --override-kd-schedule. A changed schedule ends stage 1 where its flags say, but never before the step reached. A
    crossover stays a fact while --kd-stop asks for one.
    """
    # 1) a new run begins as its flags say
    if resumed is None:
        if schedule is None:
            return None, ()
        assert (teacher is None) == (directory is None)
        return SaltState(
            stage1_end=schedule.stage1_steps, schedule=schedule.facts(), teacher=teacher, teacher_directory=directory
        ), ()
    saved, step = resumed.salt, resumed.step
    # 2) stage 2 and plain runs go on without a teacher
    if saved is None and schedule is not None:
        lacks, asks = (
            ("stage 1", f"--kd-steps {schedule.kd_steps}") if directory is None else ("teacher", f"--teacher-load {directory}")
        )
        raise UserError(
            f"--load: the run was trained without a {lacks} up to step {step}, and {asks} asks for one; "
            "--finetune takes the weights alone"
        )
    if saved is None or saved.stage_after(step) == 2:
        if saved is not None and schedule is not None and saved.resumes_in(step, resumed.evaluation_due) == 2:
            log.info(
                "step %d is in stage 2, since step %d: --teacher-load and the kd flags are not used", step, saved.stage1_end + 1
            )
        return saved, ()
    # 3) stage 1 goes on with the same teacher
    schedule = _schedule_of_same_teacher(saved, step, schedule, teacher, directory)
    # 4) and the same schedule
    return _under_schedule(saved, step, schedule, override)


def _schedule_of_same_teacher(
    saved: SaltState, step: int, schedule: Schedule | None, teacher: str | None, directory: str | None
) -> Schedule:
    """The schedule of the flags, in a run resumed inside stage 1. Raises UserError where the flags lack it or name another teacher."""
    if schedule is None and saved.teacher is None:
        raise UserError(
            f"--load: step {step} is in stage 1, which ends after step {saved.stage1_end}: give --stage1-selection and the "
            "kd flags"
        )
    if schedule is None or (directory is None and saved.teacher is not None):
        raise UserError(
            f"--load: step {step} is in stage 1, which ends after step {saved.stage1_end}: it needs its teacher, "
            f"{saved.teacher} (then in {saved.teacher_directory}); give --teacher-load and the kd flags"
        )
    if directory is not None and saved.teacher is None:
        raise UserError(
            f"--load: step {step} is in a stage 1 without a teacher, and --teacher-load {directory} asks for one; "
            "--finetune takes the weights alone"
        )
    if directory is not None and teacher is None:
        # --load-fallback chose an older checkpoint in stage 1; the newest is in stage 2, so no teacher was read.
        raise UserError(
            f"--load: step {step} is in stage 1, the newest checkpoint in stage 2, so that the teacher in --teacher-load "
            f"{directory} was not read: give the iter_* directory of step {step} to --load"
        )
    if teacher != saved.teacher:
        raise UserError(
            f"--load: step {step} is in stage 1 of a run with teacher {saved.teacher} (then in {saved.teacher_directory}), "
            f"--teacher-load {directory} is {teacher}"
        )
    return schedule


def _under_schedule(saved: SaltState, step: int, schedule: Schedule, override: bool) -> tuple[SaltState, Events]:
    """The state of a run resumed inside stage 1, under the schedule of the flags. UserError where that is another one than the
    checkpoint's, unless `override`."""
    current = schedule.facts()
    before, now = _DEFAULTS | saved.schedule, _DEFAULTS | current
    differences = [
        f"{flag(name)} is {_word(before.get(name))} there and {_word(value)} here"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if not differences:
        return saved, ()
    if not override:
        raise UserError(
            f"--load: step {step} is in stage 1 under another schedule: {'; '.join(differences)}. "
            "--override-kd-schedule goes on with the flags"
        )
    change = {"event": "kd_schedule", "step": step, "from": saved.schedule, "to": current}
    crossover = saved.crossover if schedule.kd_stop == "crossover" else None
    end = schedule.stage1_steps if crossover is None else schedule.stage1_end_after(crossover)
    return replace(saved, schedule=current, crossover=crossover, stage1_end=max(end, step)), (change,)


def _word(value: Any) -> Any:
    """A value of a schedule, as a message says it."""
    return "not given" if value == "" else value
