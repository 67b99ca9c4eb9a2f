"""SALT's switch: in which stage a run is, when the student has passed its teacher, and what stage 2 draws from. Pure.

Where stage 1 ends is a fact in `RunState.salt`, which every checkpoint holds, so that a resumed run takes the same path. The order of
samples, the optimizer, the learning rate and the random state know nothing of the stages. What a run does at the switch, such as
freeing the teacher, is in train/state.py. The teacher's weight and the check of a resumed schedule are in schedule.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_salt.checkpoint.run_state import RunState, SaltState
from megatron_salt.config import SaltConfig
from megatron_salt.data.batch import Batches
from megatron_salt.salt.fp8_check import Fidelity
from megatron_salt.salt.output_weight import BosLosses, DroppedMass
from megatron_salt.salt.schedule import Events, Schedule, StepWeights, salt_at_start
from megatron_salt.salt.stage_samples import StageSamples
from megatron_salt.salt.teacher import Teacher
from megatron_salt.salt.teacher_cache.cache import StepUse, TeacherCache
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint


@dataclass(frozen=True)
class Stage1:
    """Stage 1 of a run: its teacher, or none where a selection of the data alone makes it."""

    teacher: Teacher | None
    """None: stage 1 has a selection of the data and no teacher."""
    schedule: Schedule
    teacher_body_flops: float = 0.0
    """FLOPs of the teacher's layers for an input token; 0 without a teacher."""
    teacher_head_flops: float = 0.0
    """FLOPs of its output layer, in steps with soft labels."""
    fidelity: Fidelity | None = None
    """Distance of a teacher in FP8 from itself in bfloat16; None for any other teacher, and without one."""
    dropped: DroppedMass | None = None
    """What the teacher gives to ids that the student does not share; None where it has no such ids, and without a teacher."""
    bos_losses: BosLosses | None = None
    """Loss of an imported teacher with and without BOS; None where the data has its BOS, it knows none, and without such a teacher."""
    cache: TeacherCache | None = None
    """None: no --teacher-cache."""

    def contains(self, step: int, progress: RunState) -> bool:
        """Whether a step belongs to stage 1."""
        return self.schedule.in_stage1(step, _salt_of(progress).stage1_end)

    def weights(self, step: int, progress: RunState) -> StepWeights:
        """What the teacher teaches in a step."""
        return self.schedule.weights_at(step, _salt_of(progress).stage1_end)

    @property
    def measured_teacher(self) -> Teacher | None:
        """The teacher, where its loss on held-out data can be measured. Without soft labels it has no output layer."""
        return self.teacher if self.schedule.guide != "hidden" else None

    def flops_of_step(self, tokens: int, weights: StepWeights, use: StepUse | None) -> float:
        """FLOPs of the teacher in a step of `tokens` input tokens, over all ranks: those that are computed. use: None without a cache."""
        body = self.teacher_body_flops * (1.0 if use is None else use.computed)
        return tokens * (body + (0.0 if weights.soft_labels is None else self.teacher_head_flops))

    def flops_of_run(self, num_steps: int, tokens: int) -> float:
        """FLOPs of the teacher in a run of `num_steps` steps of `tokens` tokens without a cache, if no crossover comes."""
        schedule = self.schedule
        taught = min(schedule.stage1_steps, num_steps) * self.teacher_body_flops
        return tokens * (taught + min(schedule.kd_steps, num_steps) * self.teacher_head_flops)

    def accuracy_to_pass(self, progress: RunState) -> float:
        """The student's held-out accuracy must be above this for a crossover: the teacher's plus --kd-stop-margin."""
        held_out = _salt_of(progress).teacher_held_out
        assert held_out is not None
        return held_out["accuracy"] + self.schedule.kd_stop_margin

    def may_cross_over(self, progress: RunState) -> bool:
        """Whether a crossover would still change the run. It is decided once, and not before the first step."""
        return progress.step > 0 and self.schedule.kd_stop == "crossover" and _salt_of(progress).crossover is None

    def after_crossover(self, progress: RunState) -> RunState:
        """`progress` with a crossover at its step, which moves the end of stage 1."""
        end = self.schedule.stage1_end_after(progress.step)
        return replace(progress, salt=replace(_salt_of(progress), crossover=progress.step, stage1_end=end))


def schedule_of(salt: SaltConfig) -> Schedule | None:
    """The schedule that the flags ask for; None in a run without a stage 1."""
    return None if salt.stage1_steps is None else Schedule.of(salt)


def decide_salt(
    salt: SaltConfig, resumed: RunState | None, teacher: TeacherCheckpoint | None
) -> tuple[SaltState | None, Events]:
    """`salt_at_start` for these flags. resumed: None in a run from step 0. teacher: None where none was read. Raises UserError."""
    fingerprint = None if teacher is None else teacher.fingerprint
    directory = salt.teacher_load if teacher is None else str(teacher.directory)
    return salt_at_start(resumed, schedule_of(salt), fingerprint, directory, salt.override_kd_schedule)


def starts_in_stage2(
    state: SaltState, progress: RunState, schedule: Schedule | None, teacher: TeacherCheckpoint | None, evaluates: bool
) -> bool:
    """Whether a start begins in stage 2. schedule, teacher: of the flags. evaluates: an evaluation that is due will be made.

    An evaluation that is due at the end of stage 1 belongs to stage 1. It goes without the teacher where the flags no longer name it.
    """
    same_teacher = schedule is not None and (None if teacher is None else teacher.fingerprint) == state.teacher
    return state.resumes_in(progress.step, evaluates and progress.evaluation_due and same_teacher) == 2


def resumes_in_stage2(saved: RunState, evaluates: bool) -> bool:
    """Whether a run that resumes from this state needs no teacher. evaluates: an evaluation that is due will be made."""
    return saved.salt is not None and saved.salt.resumes_in(saved.step, evaluates and saved.evaluation_due) == 2


def data_of_stage2(train: Batches, stage_samples: StageSamples | None, progress: RunState) -> tuple[Batches, RunState]:
    """The data of stage 2, and the progress that records where stage 2 began: at its position, unless it says so already.

    train: the data of stage 1. stage_samples: None in a run without a selection, which goes on in one order.
    """
    if stage_samples is None:
        return train, progress
    since = progress.position if progress.stage2_since is None else progress.stage2_since
    train = train.going_on_with(stage_samples.stage2(train.position(since)), since)
    return train, replace(progress, stage2_since=since)


def _salt_of(progress: RunState) -> SaltState:
    assert progress.salt is not None, "a run in stage 1 knows where it ends"
    return progress.salt
