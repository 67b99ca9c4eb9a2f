"""Arms of a comparison: the seeds of one recipe, their mean and band, and when one arm passes another. Pure.

Where an arm has several seeds, a curve is the mean at the steps that all of them have, and its band goes from the lowest to the highest
seed. Positions on an axis (seconds, FLOPs) are means over the seeds too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.metrics.history import Axis, Curve

_MORE_IS_BETTER = ("acc", "agreement", "logprob", "margin", "mfu", "tflops", "tokens_per_second")


def more_is_better(figure: str) -> bool:
    """Whether a higher value of a figure is better: of accuracies, likelihoods and rates, not of losses."""
    name = figure.rpartition("/")[2].removeprefix("teacher_")
    return name.startswith(_MORE_IS_BETTER) and not name.endswith("_stderr")


@dataclass(frozen=True)
class Band:
    """A figure of an arm."""

    steps: np.ndarray
    """int64 [n]: steps at which every seed has the figure, ascending"""
    mean: np.ndarray
    """float64 [n]"""
    low: np.ndarray
    high: np.ndarray
    """float64 [n]: of the lowest and the highest seed"""


@dataclass(frozen=True)
class Arm:
    """The seeds of one recipe."""

    name: str
    curves: tuple[Curve, ...]

    def band(self, figure: str) -> Band:
        """A figure at the steps that all seeds have. UserError where one lacks it, or where they have no step in common."""
        seeds = [curve.figure(figure) for curve in self.curves]
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        if not steps:
            raise UserError(f"--y {figure}: the {len(seeds)} runs of {self.name} have it at no common step")
        values = np.array([[seed[step] for step in steps] for seed in seeds], np.float64)
        mean = values[0] if len(seeds) == 1 else (values / len(seeds)).sum(0)  # a sum of the largest numbers would be infinite
        return Band(np.array(steps, np.int64), mean, values.min(0), values.max(0))

    def when(self, x: Axis, steps: np.ndarray) -> np.ndarray:
        """Position on an axis after so many steps, the mean over the seeds: int [m] -> float64 [m]."""
        return np.mean([curve.when(x, steps) for curve in self.curves], axis=0)

    def last_common_step(self) -> int:
        """The last step that every seed has made."""
        return min(int(curve.steps[-1]) for curve in self.curves)


def arms_of(runs: Sequence[tuple[str, Curve]]) -> list[Arm]:
    """Curves of one name are the seeds of one arm; with several, each curve gets a number: "plain (2)"."""
    by_name: dict[str, list[Curve]] = {}
    for name, curve in runs:
        by_name.setdefault(name, []).append(curve)
    return [
        Arm(
            name,
            tuple(
                replace(curve, name=f"{name} ({number})" if len(seeds) > 1 else name) for number, curve in enumerate(seeds, 1)
            ),
        )
        for name, seeds in by_name.items()
    ]


@dataclass(frozen=True)
class Passing:
    """When an arm passed another's final figure."""

    arm: str
    other: str
    figure: str
    target: float
    """The other's final figure"""
    shares: dict[Axis, float] | None
    """Position of the arm at its first better value / the other's whole length, by axis; FLOPs only where both logs tell them,
    seconds only where both logs begin with the run. None: not reached."""

    def __str__(self) -> str:
        target = f"{self.other}'s final {self.figure} {figure_text(self.target)}"
        if self.shares is None:
            return f"{self.arm}: {target} not reached"
        words = {"steps": f"{self.other}'s steps", "flops": "its FLOPs", "seconds": "its seconds"}
        told = [f"{share:.1%} of {words[axis]}" for axis, share in self.shares.items()]
        return f"{self.arm} passed {target} at {', '.join(told)}"


def first_better(steps: np.ndarray, values: np.ndarray, target: float, figure: str) -> int | None:
    """The first of the steps, ascending, whose value is better than `target`, not as good; None: none is, or the target is not a number."""
    better = values > target if more_is_better(figure) else values < target
    return int(steps[np.argmax(better)]) if better.any() else None


def passing(arm: Arm, other: Arm, figure: str) -> Passing:
    """When `arm` was first better than the other's final figure. UserError where one of them lacks it."""
    own, target = arm.band(figure), float(other.band(figure).mean[-1])
    step = first_better(own.steps, own.mean, target, figure)
    if step is None:
        return Passing(arm.name, other.name, figure, target, None)
    at, end = np.array([step]), np.array([other.last_common_step()])
    axes: list[Axis] = ["steps", "flops", "seconds"]
    curves = (*arm.curves, *other.curves)
    if any(curve.flops is None for curve in curves):
        axes.remove("flops")
    if not all(curve.is_whole for curve in curves):
        axes.remove("seconds")
    shares = {axis: float(arm.when(axis, at)[0] / max(other.when(axis, end)[0], 1e-300)) for axis in axes}
    return Passing(arm.name, other.name, figure, target, shares)


def passings(arms: Sequence[Arm], figure: str) -> list[Passing]:
    """`passing` for every ordered pair of arms."""
    return [passing(arm, other, figure) for arm in arms for other in arms if arm is not other]


def finals(arms: Sequence[Arm], figures: Sequence[str]) -> list[list[str]]:
    """Rows of a table: name of the arm, number of seeds, and each figure at the end, with its band where there are several seeds."""

    def cell(arm: Arm, figure: str) -> str:
        band = arm.band(figure)
        text = figure_text(band.mean[-1])
        return text if len(arm.curves) == 1 else f"{text} ({figure_text(band.low[-1])} to {figure_text(band.high[-1])})"

    return [[arm.name, str(len(arm.curves)), *(cell(arm, figure) for figure in figures)] for arm in arms]
