"""Python's garbage collection at the same steps on every rank, and a profiler trace of chosen steps.

Steps count from 1, as in the log.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from megatron_salt.config import TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.files import whole_file


class GarbageSchedule:
    """Under --manual-gc, turns Python's collector off between `start` and `stop` and runs it after every interval-th step.

    A rank that collects makes all others wait for it, so all ranks collect at the same step.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._manual = training.manual_gc
        self._interval = training.manual_gc_interval

    def start(self) -> None:
        if self._manual:
            gc.disable()
            gc.collect()

    def after_step(self, step: int) -> None:
        if self._manual and self._interval and step % self._interval == 0:
            gc.collect()

    def stop(self) -> None:
        if self._manual:
            gc.enable()


class Profiler:
    """Under --profile, traces steps [--profile-step-start, --profile-step-end) on --profile-ranks."""

    def __init__(self, training: TrainingConfig, rank: int, directory: Path | None) -> None:
        """directory: of TensorBoard, whose profile plugin reads traces there. Every rank calls; UserError where it is None."""
        if training.profile and directory is None:
            raise UserError("--profile has nowhere to write its trace; give --tensorboard-dir or --save")
        self._steps = range(training.profile_step_start, training.profile_step_end)
        self._wanted = training.profile and rank in training.profile_ranks
        self._directory = directory
        self._rank = rank
        self._profile: torch.profiler.profile | None = None
        self._first_step = 0

    def before_step(self, step: int) -> None:
        """Start or end the trace before `step` runs. A run that resumes inside the range traces the rest of it."""
        if self._profile is not None and step not in self._steps:
            self.stop(step)
        elif self._profile is None and self._wanted and step in self._steps:
            self._first_step = step
            self._profile = torch.profiler.profile()
            self._profile.start()

    def stop(self, next_step: int) -> None:
        """Write the trace, if one is running, to rankR.stepsA-B.pt.trace.json.gz."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank{self._rank}.steps{self._first_step}-{next_step - 1}.pt.trace.json.gz"
        # The exporter compresses where the name ends in .gz.
        with whole_file(path, temporary=path.with_name("tmp." + path.name)) as temporary:
            profile.export_chrome_trace(str(temporary))
