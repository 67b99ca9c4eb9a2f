"""Two small things a long run needs: garbage collected at the same step on every rank, and a profiler trace of chosen steps.

Both count steps as the log does: step n is the n-th of the run.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from megatron_salt.config import TrainingConfig
from megatron_salt.errors import UserError


class GarbageSchedule:
    """Under --manual-gc Python's collector is off between `start` and `stop`, and runs after every interval-th step: a rank
    that collects while the others wait for it costs all of them, so all collect at once."""

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
    """Under --profile, on --profile-ranks: a trace of steps [--profile-step-start, --profile-step-end)."""

    def __init__(self, training: TrainingConfig, rank: int, directory: Path | None) -> None:
        """directory: TensorBoard's, where its profile plugin looks for traces. Every rank calls: UserError where it is None."""
        if training.profile and directory is None:
            raise UserError("--profile has nowhere to write its trace; give --tensorboard-dir or --save")
        self._steps = range(training.profile_step_start, training.profile_step_end)
        self._wanted = training.profile and rank in training.profile_ranks
        self._directory = directory
        self._rank = rank
        self._profile: torch.profiler.profile | None = None
        self._first_step = 0

    def before_step(self, step: int) -> None:
        """Start or end the trace, where `step` is the one about to run. A run resumed inside the range profiles the rest."""
        if self._profile is not None and step not in self._steps:
            self.stop(step)
        elif self._profile is None and self._wanted and step in self._steps:
            self._first_step = step
            self._profile = torch.profiler.profile()
            self._profile.start()

    def stop(self, next_step: int) -> None:
        """Write the running trace, if there is one, as rankR.stepsA-B.pt.trace.json.gz."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank{self._rank}.steps{self._first_step}-{next_step - 1}.pt.trace.json.gz"
        tmp = path.with_name("tmp." + path.name)  # the exporter compresses by the name's end
        profile.export_chrome_trace(str(tmp))
        os.replace(tmp, path)
