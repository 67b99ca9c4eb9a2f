"""In which stage a run goes on, and whether with this teacher and this schedule. Pure. (A stage 1 with a selection may have no teacher.)

What a checkpoint says holds: a run inside stage 1 goes on with the same teacher and schedule or not at all, and one in stage 2 needs
neither. Only --override-kd-schedule changes the schedule, and the change is recorded.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from megatron_salt.checkpoint.run_state import RunState, SaltState
from megatron_salt.config import flag
from megatron_salt.errors import UserError
from megatron_salt.salt.schedule import Schedule

log = logging.getLogger(__name__)

Events = tuple[dict[str, Any], ...]


def salt_from(
    resumed: RunState | None, schedule: Schedule | None, teacher: str | None, directory: str | None, override: bool
) -> tuple[SaltState | None, Events]:
    """Where the run stands, and what to record. Raises UserError, naming both sides.

    resumed: what the checkpoint says, None for a run from step 0 (--finetune too). schedule: of the flags, None without --kd-steps.
    teacher: the fingerprint of the one in --teacher-load (`directory`; None without), None where none was read. override:
    --override-kd-schedule.
    A changed schedule ends stage 1 where its flags say, but never before the step reached; a crossover stays a fact while
    --kd-stop asks for one.
    """
    if resumed is None:
        if schedule is None:
            return None, ()
        assert (teacher is None) == (directory is None)
        return SaltState(
            stage1_end=schedule.kd_steps, schedule=schedule.facts(), teacher=teacher, teacher_directory=directory
        ), ()
    saved, step = resumed.salt, resumed.step
    # 1) stage 2 and plain runs go on without a teacher
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
    # 2) stage 1 goes on with the same teacher
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
    if (
        directory is not None and teacher is None
    ):  # --load-fallback went further back than the newest checkpoint's facts let expect
        raise UserError(
            f"--load: step {step} is in stage 1, the newest checkpoint in stage 2, so that the teacher in --teacher-load "
            f"{directory} was not read: give the iter_* directory of step {step} to --load"
        )
    if teacher != saved.teacher:
        raise UserError(
            f"--load: step {step} is in stage 1 of a run with teacher {saved.teacher} (then in {saved.teacher_directory}), "
            f"--teacher-load {directory} is {teacher}"
        )
    # 3) and the same schedule
    here = schedule.facts()
    differences = [
        f"{flag(name)} is {saved.schedule.get(name)} there and {value} here"
        for name, value in here.items()
        if saved.schedule.get(name) != value
    ]
    if not differences:
        return saved, ()
    if not override:
        raise UserError(
            f"--load: step {step} is in stage 1 under another schedule: {'; '.join(differences)}. "
            "--override-kd-schedule goes on with the flags"
        )
    change = {"event": "kd_schedule", "step": step, "from": saved.schedule, "to": here}
    crossover = saved.crossover if schedule.kd_stop == "crossover" else None
    end = schedule.kd_steps if crossover is None else schedule.stage1_end_after(crossover)
    return replace(saved, schedule=here, crossover=crossover, stage1_end=max(end, step)), (change,)
