"""Curves of runs as tables, as a chart in characters, and as a picture. The page for a browser is in page.py."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.metrics.arms import Arm
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.metrics.history import Axis, Curve

MARKS = "*o+x#@" + string.ascii_uppercase + string.digits
"""Of more runs than these, marks come again."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4b8a", "#7f7f7f")
"""Of arms, in pictures and pages: most of them are Okabe and Ito's, which can be told apart with any kind of colour vision."""

WIDTH, HEIGHT = 72, 14


RUN_HEADS = (
    "run", "steps", "tokens", "training loss", "held-out loss", "accuracy", "stage 2 from", "tokens/s", "time", "median step",
    "peak memory",
)  # fmt: skip


def run_rows(curves: Sequence[Curve]) -> list[list[str]]:
    """A row of RUN_HEADS for each run.

    The training loss is the mean of the last twentieth of the steps. tokens/s and time are wall-clock times of steps, without
    evaluations and saves. On a shared machine the median step time suffers least from other processes.
    """
    rows = []
    for curve in curves:
        last = curve.losses[-max(1, len(curve.losses) // 20) :]
        seconds, tokens = curve.seconds[-1], int(curve.tokens[-1])
        rows.append(
            [
                curve.name,
                str(curve.steps[-1]),
                str(tokens),
                figure_text(smoothed(last, len(last))[-1]),
                "-" if curve.final is None else figure_text(curve.final),
                "-" if curve.accuracy is None else f"{curve.accuracy:.2%}",
                "-" if curve.switch is None else f"step {curve.switch.step + 1}",
                f"{tokens / max(seconds, 1e-9):.0f}",
                f"{seconds:.1f} s",
                f"{1000 * np.median(np.diff(curve.seconds, prepend=0)):.4g} ms",
                f"{curve.peak_gib:.2f} GiB",
            ]
        )
    return rows


def table(curves: Sequence[Curve], unigram: float | None) -> str:
    """`run_rows` with heads, followed by notes."""
    notes = [note for curve in curves for note in notes_on(curve)]
    notes += [] if unigram is None else [f"unigram entropy of held-out tokens: {unigram:.4f}"]
    return "\n".join([in_columns(RUN_HEADS, run_rows(curves)), *notes])


def in_columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in characters: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def notes_on(curve: Curve) -> list[str]:
    """Lines about a run that do not fit into the table."""
    notes = []
    if curve.teacher is not None:
        notes.append(f"{curve.name}: its teacher has held-out loss {curve.teacher[0]:.4f}, accuracy {curve.teacher[1]:.2%}")
    if curve.switch is not None:
        at = curve.switch
        freed = (
            ""
            if at.gib_before is None
            else (f"; memory in use {at.gib_before:.3f} GiB before the teacher was freed, {at.gib_after:.3f} GiB after")
        )
        notes.append(f"{curve.name}: stage 1 ended after step {at.step}{freed}")
    if not curve.is_whole:
        notes.append(f"{curve.name}: its log begins with step {curve.steps[0]}; tokens and seconds count from there")
    if curve.unread_lines:
        notes.append(f"{curve.name}: {curve.unread_lines} lines of its log could not be read")
    return notes


def chart(curves: Sequence[Curve], x: Axis, unigram: float | None) -> str:
    """Chart of the training losses: one mark for each run, `-` for the unigram entropy."""
    right = max(float(curve.axis(x)[-1]) for curve in curves) or 1.0
    columns = [_columns(curve, x, right) for curve in curves]
    heights = np.concatenate([*columns, [] if unigram is None else [unigram]])
    heights = heights[np.isfinite(heights)]
    if not heights.size:
        return "no finite loss"
    low, high = float(heights.min()), float(heights.max())
    half = max(high / 2 - low / 2, 5e-7)  # of the span, which may be too large for a number

    def row(loss: float) -> int:
        return round((high / 2 - loss / 2) / half * (HEIGHT - 1))

    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    if unigram is not None:
        grid[row(unigram)] = ["-"] * WIDTH
    for mark, column in zip(itertools.cycle(MARKS), columns, strict=False):
        for position, loss in enumerate(column):
            if math.isfinite(loss):
                grid[row(loss)][position] = mark
    levels = [high - half * (i / (HEIGHT - 1)) - half * (i / (HEIGHT - 1)) for i in range(HEIGHT)]
    labels = [f"{level:7.3f}" if abs(level) < 1e6 else f"{level:.3g}" for level in levels]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} |{''.join(line).rstrip()}" for label, line in zip(labels, grid, strict=True)]
    legend = [f"{mark} {curve.name}" for mark, curve in zip(itertools.cycle(MARKS), curves, strict=False)]
    legend += [] if unigram is None else [f"- unigram entropy {unigram:.3f}"]
    axis = f"{'0'.ljust(WIDTH // 2)}{f'{right:.6g} {x}'.rjust(WIDTH // 2)}"
    return "\n".join(
        [f"training loss: {', '.join(legend)}", *lines, " " * margin + " +" + "-" * WIDTH, " " * margin + "  " + axis]
    )


def _columns(curve: Curve, x: Axis, right: float) -> np.ndarray:
    """Mean loss in each of WIDTH equal slices of [0, right], float64 [WIDTH]; nan for a slice without steps."""
    where = np.minimum((curve.axis(x) / right * WIDTH).astype(int), WIDTH - 1)
    finite = np.isfinite(curve.losses)
    counts = np.bincount(where[finite], minlength=WIDTH)
    means = np.bincount(where[finite], curve.losses[finite] / counts[where[finite]], WIDTH)
    return np.where(counts > 0, means, np.nan)


Panel = tuple[str, ...]
"""Names of figures that share one vertical axis."""

X_WORDS: dict[Axis, str] = {
    "steps": "steps", "tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs of student and teacher",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A figure of an arm as it is drawn."""

    label: str
    arm: int
    """Number of the arm, which gives the colour"""
    place: int
    """Number of the figure in its panel, which gives the mark"""
    at: np.ndarray
    """float64 [n], position on the horizontal axis"""
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """float64 [n]; equal to `value` for an arm with one seed"""
    of_steps: bool
    """Whether the figure is one of training steps, which is drawn smoothed, and not of evaluations."""


def lines_of(arms: Sequence[Arm], panel: Panel, x: Axis) -> list[Line]:
    """What a panel shows. Figures of steps are means over a twenty-fifth of the steps. UserError where an arm lacks a figure."""
    lines = []
    for number, arm in enumerate(arms):
        for place, figure in enumerate(panel):
            band = arm.band(figure)
            of_steps = figure not in arm.curves[0].of_evaluations
            value, low, high = band.mean, band.low, band.high
            if of_steps:
                window = max(1, len(value) // 25)
                value, low, high = (smoothed(one, window) for one in (value, low, high))
            label = arm.name if len(panel) == 1 else f"{arm.name}, {figure}"
            value, low, high = map(drawable, (value, low, high))
            lines.append(Line(label, number, place, arm.when(x, band.steps), value, low, high, of_steps))
    return lines


def shows_losses(panel: Panel) -> bool:
    """Whether a panel shows nothing but losses, in nats a token."""
    return all(figure.endswith("/loss") for figure in panel)


def end_words(line: Line) -> str:
    """The last value of a line in words, with its band: "3.2100 (3.2000 to 3.2200)"."""
    if math.isnan(line.value[-1]):
        return "not finite"
    last, low, high = (figure_text(float(values[-1])) for values in (line.value, line.low, line.high))
    return last if low == high else f"{last} ({low} to {high})"


def drawable(values: np.ndarray) -> np.ndarray:
    """The values with nan for those that are not finite. Beyond 1e300 they lie at 1e300: the length of an axis must be a number too."""
    return np.where(np.isfinite(values), np.clip(values, -1e300, 1e300), np.nan)


def switches_of(arms: Sequence[Arm], x: Axis) -> list[tuple[int, str, float]]:
    """(number of the arm, label, position) of each end of stage 1; of seeds that differ, the first seed's."""
    return [
        (number, f"{arm.name}, stage 1 ends (step {switch.step})", float(arm.when(x, np.array([switch.step]))[0]))
        for number, arm in enumerate(arms)
        if (switch := arm.curves[0].switch) is not None
    ]


def axis_title(panel: Panel) -> str:
    """What the vertical axis of a panel shows."""
    if shows_losses(panel):
        return f"{panel[0] if len(panel) == 1 else 'loss'}, nats a token"
    return ", ".join(dict.fromkeys(figure.replace("_", " ") for figure in panel))


def draw(arms: Sequence[Arm], panels: Sequence[Panel], x: Axis, unigram: float | None, output: Path) -> None:
    """Draw a PNG with one plot for each panel: figures of steps as lines (thin: raw, of a single seed), those of evaluations as marks, the
    band of several seeds shaded, switches to stage 2 as vertical lines. unigram: drawn where a panel shows losses.

    Raises OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(len(panels), figsize=(8, 5 * len(panels)), layout="constrained", squeeze=False)
    for axes, panel in zip(plots[:, 0], panels, strict=True):
        for line in lines_of(arms, panel, x):
            colour = COLOURS[line.arm % len(COLOURS)]
            style = "-" if line.of_steps else f"{'os^Dv'[(line.arm + line.place) % 5]}--"
            axes.plot(line.at, line.value, style, color=colour, markersize=5, label=line.label)
            if not np.array_equal(line.low, line.high):
                axes.fill_between(line.at, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        for number, arm in enumerate(arms):
            for name in panel:
                if len(arm.curves) == 1 and name in arm.curves[0].of_steps:
                    raw = drawable(arm.curves[0].of_steps[name])
                    axes.plot(arm.curves[0].axis(x), raw, color=COLOURS[number % len(COLOURS)], alpha=0.25, linewidth=0.8)
        ends: dict[float, list[tuple[int, str]]] = {}
        for number, label, at in switches_of(arms, x):
            ends.setdefault(at, []).append((number, label))
        for at, those in ends.items():  # lines of several arms would lie on each other
            number, label = those[0]
            colour = COLOURS[number % len(COLOURS)] if len(those) == 1 else "black"
            label = label if len(those) == 1 else f"stage 1 of {len(those)} arms ends"
            axes.axvline(at, color=colour, linestyle="--", linewidth=1, label=label)
        if unigram is not None and shows_losses(panel):
            axes.axhline(unigram, color="gray", linestyle=":", label="unigram entropy of held-out tokens")
        axes.set_xlabel(X_WORDS[x])
        axes.set_ylabel(axis_title(panel))
        axes.grid(alpha=0.3)
        for text in axes.legend().get_texts():
            text.set_parse_math(False)  # a name may have dollar signs
    try:
        figure.savefig(output, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """At each step, the mean of the finite losses among the last `window` steps: float64 [n] -> [n]; nan if there is none."""
    finite = np.isfinite(losses)
    shares = _sums(
        np.where(finite, losses, 0.0) / window, window
    )  # divided first: a sum of the largest numbers would be infinite
    counts = _sums(finite.astype(np.float64), window)
    return np.where(counts > 0, shares * (window / np.maximum(counts, 1)), np.nan)


def _sums(values: np.ndarray, window: int) -> np.ndarray:
    """At each position, the sum of the last `window` values: float64 [n] -> [n].

    A difference of two sums from the beginning would lose all that follows a value which is far larger. So each sum is that of the end of
    one block of `window` values, and of the beginning of the next."""
    blocks = np.pad(values, (window, -len(values) % window)).reshape(-1, window)
    heads = np.cumsum(blocks, axis=1)
    tails = np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1]
    after = np.pad(tails[:-1, 1:], ((0, 0), (0, 1)))  # of the block before, what the window still holds
    return (heads[1:] + after).reshape(-1)[: len(values)]
