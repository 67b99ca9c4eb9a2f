"""The two stages of a run: what is said of stage 1 when it starts, when it ends, and what happens then.

Where stage 1 ends is a fact in `RunState.salt`, which every checkpoint holds, so that a resumed run takes the same path. The order of
samples, the optimizer, the learning rate and the random state know nothing of the stages.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.metrics.run_log import RunLog, memory_in_use_gib
from megatron_salt.parallel.collectives import from_rank_0, largest
from megatron_salt.salt.schedule import Schedule
from megatron_salt.salt.teacher import Teacher


@dataclass(frozen=True)
class Stage1:
    """A teacher at work, or a selection of the data alone."""

    teacher: Teacher | None
    """None: the data is selected, and nothing else."""
    schedule: Schedule
    teacher_flops: float = 0.0
    """The teacher's FLOPs for an input token, output layer included; 0 without a teacher."""

    def goes_on(self, step: int, progress: RunState) -> bool:
        """Whether a step is still of stage 1. Pure."""
        assert progress.salt is not None
        return self.schedule.in_stage1(step, progress.salt.stage1_end)

    def kd_weight(self, step: int, progress: RunState) -> float:
        """The teacher's weight in the loss of a step. Pure."""
        assert progress.salt is not None
        return self.schedule.at(step, progress.salt.stage1_end)


def pass_crossover(stage1: Stage1, progress: RunState, accuracy: float, log: RunLog) -> RunState:
    """Decide, after an evaluation, whether the student has passed its teacher. Collective over all ranks; all get the same answer.

    accuracy: the student's, next-token, on held-out data. A crossover is decided once, and moves the end of stage 1.
    """
    salt = progress.salt
    assert salt is not None and salt.teacher_held_out is not None
    margin = stage1.schedule.kd_stop_margin
    needed = salt.teacher_held_out["accuracy"] + margin
    passed = from_rank_0(lambda: accuracy > needed)
    if stage1.schedule.kd_stop != "crossover" or salt.crossover is not None or not passed:
        return progress
    end = stage1.schedule.stage1_end_after(progress.step)
    log.event(
        progress.step,
        f"the student's held-out accuracy {accuracy:.4f} has passed the teacher's {salt.teacher_held_out['accuracy']:.4f} by more than "
        f"--kd-stop-margin {margin:g}: stage 1 ends after step {end}",
        {"crossover": progress.step, "stage1_end": end},
    )
    return replace(progress, salt=replace(salt, crossover=progress.step, stage1_end=end))


def free_teacher(teacher: Teacher, progress: RunState, micro_batch_size: int, log: RunLog) -> None:
    """End stage 1: give up the teacher, and log what that was worth. micro_batch_size: of stage 2. Collective over all ranks."""
    started, before = time.perf_counter(), memory_in_use_gib()
    teacher_gib = teacher.num_bytes / 2**30
    teacher.free()
    after = memory_in_use_gib()
    most = largest(round((before - after) * 2**20)) / 2**20
    log.event(
        progress.step,
        f"stage 2: the teacher ({teacher_gib:.3f} GiB here) is gone in {time.perf_counter() - started:.2f} s; memory in use "
        f"{before:.3f} GiB before, {after:.3f} GiB after ({most:.3f} GiB less on the rank that gained most)",
        {"stage": 2, "memory_gib_before": before, "memory_gib_after": after, "micro_batch_size": micro_batch_size},
    )
