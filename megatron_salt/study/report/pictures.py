"""Pictures of a study's report: paired differences here; curves are those of metrics/figures.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_salt.metrics.arms import Arm, more_is_better
from megatron_salt.metrics.figures import COLOURS, draw
from megatron_salt.study.analysis.statistics import Comparison
from megatron_salt.study.report.content import Report


def curve_file(figure: str) -> str:
    """Name of the picture of a figure's curves."""
    return f"curves-{re.sub(r'[^A-Za-z0-9]+', '-', figure)}.png"


def arms_with(report: Report, figure: str) -> list[int]:
    """Positions in `report.curves` of the arms whose runs all have a figure, at steps in common."""

    def steps(arm: Arm) -> set[int]:
        return set.intersection(*(set(curve.of_evaluations.get(figure, {})) for curve in arm.curves))

    return [number for number, (arm, _) in enumerate(report.curves) if steps(arm)]


def draw_curves(report: Report, figure: str, output: Path) -> None:
    """A figure of all arms that have it, by steps. At least one arm must."""
    draw([report.curves[number][0] for number in arms_with(report, figure)], [(figure,)], "steps", None, output)


def better_side(figure: str) -> str:
    """Which side of 0 is better for the first arm of a difference."""
    return "above" if more_is_better(figure) else "below"


def by_figure(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """{figure: comparisons with at least one pair}, in their order; figures without one are left out."""
    found: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if one.differences:
            found.setdefault(one.figure, []).append(one)
    return found


def draw_differences(comparisons: Sequence[Comparison], output: Path) -> None:
    """A dot for each seed, a bar at the mean, and the 95% interval where the primary question has one: one plot for each figure.

    At least one comparison must have a pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_figure(comparisons)
    heights = [1.3 + 0.4 * len(group) for group in groups.values()]
    figure, plots = pyplot.subplots(
        len(groups), figsize=(8, sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    for axes, (name, group) in zip(plots[:, 0], groups.items(), strict=True):
        for row, one in enumerate(group):
            colour, mean = COLOURS[0 if one.primary else -1], one.mean
            if one.interval is not None:
                axes.plot(one.interval, [row, row], color=colour, linewidth=2)
            axes.plot(one.differences, [row] * len(one.differences), "o", color=colour, alpha=0.7, markersize=6)
            axes.plot([mean], [row], "|", color=colour, markersize=16, markeredgewidth=2)
        labels = [f"{one.arm} - {one.against}{'' if one.primary else ' (exploratory)'}" for one in group]
        axes.set_yticks(range(len(group)), labels, parse_math=False)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.axvline(0, color="black", linewidth=1, linestyle="--")
        axes.set_xlabel(f"{name}: difference of a seed's runs; {better_side(name)} 0 is better")
        axes.grid(alpha=0.3, axis="x")
        if any(one.interval is not None for one in group):
            axes.set_title("line: 95% interval of the primary question; bars: means; dots: seeds", fontsize=9, loc="left")
    try:
        figure.savefig(output, format="png", dpi=120)
    finally:
        pyplot.close(figure)
