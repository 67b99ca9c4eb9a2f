"""Loss curves of runs as a table, as a chart in characters, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_salt.files import whole_file
from megatron_salt.metrics.history import Axis, Curve

MARKS = "*o+x#@"
WIDTH, HEIGHT = 72, 14


def table(curves: Sequence[Curve], unigram: float | None) -> str:
    """Table with a row for each run, followed by notes.

    The training loss is the mean of the last twentieth of the steps. tokens/s and time are wall-clock times of steps, without
    evaluations and saves. On a shared machine the median step time suffers least from other processes.
    """
    heads = [
        "run",
        "steps",
        "tokens",
        "training loss",
        "held-out loss",
        "accuracy",
        "stage 2 from",
        "tokens/s",
        "time",
        "median step",
        "peak memory",
    ]
    rows = []
    for curve in curves:
        last = curve.losses[-max(1, len(curve.losses) // 20) :]
        seconds, tokens = curve.seconds[-1], int(curve.tokens[-1])
        rows.append(
            [
                curve.name,
                str(curve.steps[-1]),
                str(tokens),
                f"{np.nanmean(last):.4f}" if np.isfinite(last).any() else "nan",
                "-" if curve.final is None else f"{curve.final:.4f}",
                "-" if curve.accuracy is None else f"{curve.accuracy:.2%}",
                "-" if curve.switch is None else f"step {curve.switch.step + 1}",
                f"{tokens / max(seconds, 1e-9):.0f}",
                f"{seconds:.1f} s",
                f"{1000 * np.median(np.diff(curve.seconds, prepend=0)):.4g} ms",
                f"{curve.peak_gib:.2f} GiB",
            ]
        )
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(
        lines
        + [note for curve in curves for note in _notes(curve)]
        + ([] if unigram is None else [f"unigram entropy of held-out tokens: {unigram:.4f}"])
    )


def _notes(curve: Curve) -> list[str]:
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
    span = max(high - low, 1e-6)

    def row(loss: float) -> int:
        return round((high - loss) / span * (HEIGHT - 1))

    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    if unigram is not None:
        grid[row(unigram)] = ["-"] * WIDTH
    for mark, column in zip(MARKS, columns, strict=False):
        for position, loss in enumerate(column):
            if math.isfinite(loss):
                grid[row(loss)][position] = mark
    lines = [f"{high - span * i / (HEIGHT - 1):7.3f} |{''.join(line).rstrip()}" for i, line in enumerate(grid)]
    legend = [f"{mark} {curve.name}" for mark, curve in zip(MARKS, curves, strict=False)]
    legend += [] if unigram is None else [f"- unigram entropy {unigram:.3f}"]
    axis = f"{'0'.ljust(WIDTH // 2)}{f'{right:.6g} {x}'.rjust(WIDTH // 2)}"
    return "\n".join([f"training loss: {', '.join(legend)}", *lines, " " * 8 + "+" + "-" * WIDTH, " " * 9 + axis])


def _columns(curve: Curve, x: Axis, right: float) -> np.ndarray:
    """Mean loss in each of WIDTH equal slices of [0, right], float64 [WIDTH]; nan for a slice without steps."""
    where = np.minimum((curve.axis(x) / right * WIDTH).astype(int), WIDTH - 1)
    finite = np.isfinite(curve.losses)
    sums = np.bincount(where[finite], curve.losses[finite], WIDTH)
    counts = np.bincount(where[finite], minlength=WIDTH)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def draw(curves: Sequence[Curve], x: Axis, unigram: float | None, output: Path) -> None:
    """Draw training losses (thin: raw, thick: smoothed), held-out losses (marks) and switches to stage 2 (vertical lines).

    The file appears whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, curve in enumerate(curves):
        at, colour = curve.axis(x), f"C{number}"
        axes.plot(at, curve.losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(at, smoothed(curve.losses, max(1, len(at) // 25)), color=colour, label=f"{curve.name}, training")
        evaluated = [step for step in curve.held_out if step in curve.steps]
        if evaluated:
            places = [_when(curve, x, step) for step in evaluated]
            axes.plot(
                places,
                [curve.held_out[step] for step in evaluated],
                "o--",
                color=colour,
                markersize=5,
                linewidth=1,
                label=f"{curve.name}, held-out",
            )
        if curve.switch is not None:
            axes.axvline(
                _when(curve, x, curve.switch.step),
                color=colour,
                linestyle="--",
                linewidth=1,
                label=f"{curve.name}, stage 1 ends (step {curve.switch.step})",
            )
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle=":", label="unigram entropy of held-out tokens")
    axes.set_xlabel({"steps": "steps", "tokens": "tokens", "seconds": "seconds of training"}[x])
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with whole_file(output) as tmp:
            figure.savefig(tmp, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def _when(curve: Curve, x: Axis, step: int) -> float:
    """Position of a step on the horizontal axis."""
    return float(curve.axis(x)[min(int(np.searchsorted(curve.steps, step)), len(curve.steps) - 1)])


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """At each step, the mean of the finite losses among the last `window` steps: float64 [n] -> [n]; nan if there is none."""
    finite = np.isfinite(losses)
    sums = np.cumsum(np.where(finite, losses, 0.0))
    counts = np.cumsum(finite)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
