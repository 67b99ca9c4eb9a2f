"""What a run directory says of its run: state, reason, configuration and curve, from the run's own files. Nothing is written.

Whatever is missing or damaged is told in `RunResult.reason`, and the run counts as failed: no run is dropped, and none is believed that
cannot be read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.checkpoint import owner, save_directory
from megatron_salt.config import RunConfig
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.errors import UserError
from megatron_salt.metrics.history import Curve, read_curve
from megatron_salt.small_files import one_line, read_small
from megatron_salt.study.jobs.outcome import Outcome, read_outcome
from megatron_salt.study.results import Kind, RunResult, RunState

LOG = "train.jsonl"


@dataclass(frozen=True, kw_only=True)
class ExpectedRun:
    """A run that the study has, and where it lies."""

    arm: str
    kind: Kind
    seed: int
    settings: Mapping[str, str]
    """{axis: value as text}"""
    directory: Path
    steps: int
    """Optimizer steps that the study gives it"""


def read_run(planned: ExpectedRun) -> RunResult:
    """The run as it is on disk now. Never raises for what lies there."""
    name = " ".join([planned.arm, *(f"{axis}={value}" for axis, value in planned.settings.items()), f"seed {planned.seed}"])
    config, problem_of_config = _config(planned.directory)
    curve, problem_of_log = _curve(name, planned.directory / LOG)
    outcome = read_outcome(planned.directory / "outcome.txt")
    foreign = _foreign(planned, config, curve)
    state, reason = _state(planned, outcome, curve, problem_of_log)
    if foreign is not None:
        state, reason, curve = "failed", foreign, None
    elif problem_of_config is not None and state != "failed":
        state, reason = "failed", problem_of_config
    return RunResult(
        arm=planned.arm, kind=planned.kind, seed=planned.seed, settings=planned.settings, directory=planned.directory,
        state=state, reason=one_line(reason), config=config, curve=curve,
    )  # fmt: skip


def not_finite_since(curve: Curve) -> int | None:
    """The step from which on the run is not finite: the first of the last steps in a row whose loss or gradient is not, else the step of a
    last evaluation that is not. None: it ends with finite numbers. Pure."""
    norms = curve.of_steps.get("train/grad_norm", np.zeros(len(curve.steps)))
    finite = np.isfinite(curve.losses) & np.isfinite(norms)
    if not finite[-1]:
        sound = np.flatnonzero(finite)
        return int(curve.steps[sound[-1] + 1 if len(sound) else 0])
    last = max(curve.held_out, default=None)
    return last if last is not None and not math.isfinite(curve.held_out[last]) else None


def _state(planned: ExpectedRun, outcome: Outcome | None, curve: Curve | None, problem: str | None) -> tuple[RunState, str]:
    bad_step = None if curve is None else not_finite_since(curve)
    if outcome is not None and outcome.word not in ("done", "left"):
        if bad_step is not None:
            return "failed", f"not finite at step {bad_step}: {outcome.reason}"
        return "failed", f"{outcome.word}: {outcome.reason}"
    is_done = outcome is not None and outcome.word == "done"
    if not is_done:
        if _is_owned(planned.directory):
            return "running", ""
        is_done = outcome is None and curve is not None and int(curve.steps[-1]) == planned.steps  # started by hand, or copied
    if curve is None:
        if is_done:
            return "failed", problem or f"{planned.directory / LOG} is missing"
        return ("failed", problem) if problem is not None else ("waiting", "")
    flaw = _flaw(planned, curve, is_done)
    if flaw is None and is_done and bad_step is not None:
        flaw = f"not finite at step {bad_step}"
    if flaw is not None:
        return "failed", flaw
    return ("finished" if is_done else "waiting"), ""


def _flaw(planned: ExpectedRun, curve: Curve, is_done: bool) -> str | None:
    """What is wrong with the log of a run of this study; None: nothing."""
    first, last, log = int(curve.steps[0]), int(curve.steps[-1]), planned.directory / LOG
    if first != 1:
        return f"{log} begins at step {first}, so its tokens and seconds are those of a part"
    missing = last - len(curve.steps)
    if missing:
        return f"{log} lacks {missing} of its {last} steps ({curve.unread_lines} lines cannot be read)"
    if is_done and last != planned.steps:
        return f"{log} is cut off: it ends at step {last}, and the run is done after {planned.steps}"
    damaged = curve.unread_lines - _ends_in_a_line(log)
    if is_done and damaged > 0:
        return f"{log} has lines that cannot be read ({damaged}), so evaluations may be missing"
    return None


def _ends_in_a_line(log: Path) -> bool:
    """Whether the log ends within a line, as a crash leaves it; nothing of a finished run is lost with that."""
    try:
        with open(log, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False


def _foreign(planned: ExpectedRun, config: RunConfig | None, curve: Curve | None) -> str | None:
    """Why the directory holds another run than the study's; None: it does not."""
    if config is not None and config.training.seed != planned.seed:
        return f"{planned.directory} holds a run with --seed {config.training.seed}, and the study says {planned.seed}"
    iters = None if config is None else config.training.train_iters
    if iters is not None and iters != planned.steps:
        return f"{planned.directory} holds a run with --train-iters {iters}, and the study says {planned.steps}"
    if curve is not None and int(curve.steps[-1]) > planned.steps:
        return f"{planned.directory / LOG} goes to step {curve.steps[-1]}, and the study's run has {planned.steps}"
    return None


def _curve(name: str, path: Path) -> tuple[Curve | None, str | None]:
    """The curve, or why there is none; neither where no run has written yet."""
    try:
        if not os.path.lexists(path):
            return None, None
        if path.is_file() and path.stat().st_size == 0:
            return None, None
        return read_curve(name, path), None
    except UserError as error:
        return None, str(error).removeprefix(f"--run {name}=").removeprefix("--run ")
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"


def _config(directory: Path) -> tuple[RunConfig | None, str | None]:
    """The configuration that the run wrote into its newest checkpoint, or why it cannot be read; neither without a checkpoint."""
    try:
        checkpoints = list(save_directory.whole_checkpoints(directory).values())
        if not checkpoints:
            return None, None
        path = checkpoints[-1] / save_directory.RUN_YAML
        return from_yaml(read_small(path).decode("utf-8"), str(path)), None
    except UserError as error:
        return None, str(error)
    except (OSError, ValueError) as error:
        return None, f"the run.yaml of its newest checkpoint cannot be read: {error}"


def _is_owned(directory: Path) -> bool:
    """Whether a run works in the directory, as far as this machine can see."""
    try:
        found, _ = owner.read(directory)
    except (OSError, UserError):
        return False
    verdict, _ = owner.decide(found, owner.myself(os.environ), owner.process_start, take_over=False)
    return verdict != "take"
