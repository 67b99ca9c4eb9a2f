"""Runs of two arms with one seed make a pair: they share initialisation and order of the data. Pure.

No run is dropped in silence. A run that failed, that has not ended, whose log is cut, or whose partner is missing is told in a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.metrics.history import Curve
from megatron_salt.study.results import RunResult


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed, both finished with a whole end of their logs."""

    arm: RunResult
    against: RunResult

    @property
    def seed(self) -> int:
        return self.arm.seed


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """The runs of one arm and of another, by seed."""

    arm: str
    against: str
    pairs: tuple[Pair, ...]
    """In the order of seeds"""
    lost: tuple[Pair, ...]
    """Seeds whose run of `arm` failed while that of `against` finished"""
    told: tuple[str, ...]
    """A line for each seed that is not in `pairs`, those of `lost` included"""


def pair_runs(results: Sequence[RunResult], arm: str, against: str) -> Pairing:
    """Pair the runs with label `arm`, each with its partner of `against`: the name of an arm, or the label of some of its runs.

    Of an arm's runs, the partner is the one with most settings of the run, and no other settings: SALT at one learning rate is paired with
    the baseline at that rate, and with the plain baseline where there is none. UserError for a label that no run has, or for two runs of a
    seed.
    """
    by_seed = {run.seed: run for run in _runs_of(results, arm)}
    partners = _partners(results, by_seed, against)
    pairs, lost, told = [], [], []
    for seed in sorted({*by_seed, *partners}):
        own, other = by_seed.get(seed), partners.get(seed)
        reasons = [
            f"no run of {name}" if run is None else why
            for name, run in ((arm, own), (against, other))
            if (why := unusable(run))
        ]
        told += [f"seed {seed}: {'; '.join(reasons)}"] if reasons else []
        if own is None or other is None or unusable(other):
            continue
        if not reasons:
            pairs.append(Pair(own, other))
        elif own.state == "failed":
            lost.append(Pair(own, other))
    return Pairing(arm=arm, against=against, pairs=tuple(pairs), lost=tuple(lost), told=tuple(told))


def unusable(run: RunResult | None) -> str:
    """Why a run cannot be compared at its end; empty for one that can."""
    if run is None:
        return "no run"
    if run.state == "failed":
        return f"{run.label} failed: {run.reason or 'no reason is known'}"
    if run.state != "finished":
        return f"{run.label} is {run.state}"
    if run.curve is None:
        return f"{run.label} finished, but no step is in its log"
    last, planned = int(run.curve.steps[-1]), _planned_steps(run)
    return f"the log of {run.label} ends at step {last} of {planned}" if planned not in (None, last) else ""


def _planned_steps(run: RunResult) -> int | None:
    """Steps that the run's own flags ask for; None where they do not tell."""
    if run.config is None:
        return None
    training = run.config.training
    if training.train_iters is not None or training.train_samples is None or training.global_batch_size is None:
        return training.train_iters
    return training.train_samples // training.global_batch_size


def value_at(curve: Curve, figure: str, step: int) -> float | str:
    """A figure of a run after a step; a text says why there is none."""
    try:
        values = curve.figure(figure)
    except UserError:
        return f"no {figure} in its log"
    if step not in values:
        return f"no {figure} at step {step}"
    return values[step] if math.isfinite(values[step]) else f"{figure} is not finite at step {step}"


def _runs_of(results: Sequence[RunResult], label: str) -> list[RunResult]:
    """The runs of a label, one for each seed."""
    found = [run for run in results if run.label == label]
    if not found:
        labels = list(dict.fromkeys(run.label for run in results))
        raise UserError(f"no run of {label}{did_you_mean(label, labels)}; the study has {', '.join(labels) or 'none'}")
    _require_one_of_each_seed(found)
    return found


def _partners(results: Sequence[RunResult], by_seed: dict[int, RunResult], against: str) -> dict[int, RunResult]:
    """{seed: the run of `against`}, for the seeds of `by_seed` and for those that it lacks."""
    settings = next(iter(by_seed.values())).settings
    fitting = [run for run in results if run.arm == against and run.settings.items() <= settings.items()]
    if not fitting:
        return {run.seed: run for run in _runs_of(results, against)}
    most = max(len(run.settings) for run in fitting)
    fitting = [run for run in fitting if len(run.settings) == most]
    _require_one_of_each_seed(fitting)
    return {run.seed: run for run in fitting}


def _require_one_of_each_seed(runs: Sequence[RunResult]) -> None:
    by_seed: dict[int, RunResult] = {}
    for run in runs:
        if run.seed in by_seed:
            raise UserError(f"two runs of {run.label} have seed {run.seed}: {by_seed[run.seed].directory} and {run.directory}")
        by_seed[run.seed] = run
