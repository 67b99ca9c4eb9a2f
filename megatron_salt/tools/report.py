"""What runs came to, from their JSONL logs: a table and a curve of the loss on the terminal, and a picture.

    python tools/report.py --run plain=runs/a/train.jsonl salt=runs/b/train.jsonl --output loss.png \\
        --unigram-of data/held_out_text_document

The unigram entropy of held-out tokens is the loss of the best model that knows how often each token occurs there and nothing
of context: what a language model has to get below. Of a run with a teacher the training loss shown is the cross entropy with the
data, which can be compared with other runs', not the mixture that stage 1 trains on; the switch to stage 2 is a vertical line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.cli import run_tool
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_present, sole_writer, whole_file
from megatron_salt.metrics.history import Axis, Curve, read_curve

MARKS = "*o+x#@"
WIDTH, HEIGHT = 72, 14
BLOCK = 1 << 22


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs by their logs."""

    run: tuple[str, ...]
    """NAME=FILE, one or several: what to call a run, and its JSONL (SAVE/train.jsonl). FILE alone is called by its directory."""

    output: str | None = None
    """PNG to write; default: none."""

    overwrite: bool = False
    """Replace a picture that is already there."""

    x: Axis = "steps"
    """What the loss is drawn against: steps, tokens read, or seconds of training."""

    unigram_of: str | None = None
    """Dataset prefix (.bin/.idx), the held-out one usually, whose unigram entropy is printed and drawn as a line."""

    below_unigram: float | None = None
    """Fail, with status 1, unless the last held-out loss of every run is at most this share of the unigram entropy."""

    below: tuple[str, ...] = ()
    """NAME:OTHER, one or several pairs of runs: fail, with status 1, unless the last held-out loss of NAME is below that of OTHER."""

    below_margin: float = 0.0
    """With --below: let the loss of NAME end up to this much above that of OTHER. One seed cannot show small differences."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("--run names no run; give NAME=FILE")
        if len(self.run) > len(MARKS):
            raise UserError(f"--run takes up to {len(MARKS)} runs, got {len(self.run)}")
        if self.below_unigram is not None and self.unigram_of is None:
            raise UserError(f"--below-unigram {self.below_unigram} needs --unigram-of")
        if self.below_unigram is not None and not 0 < self.below_unigram < math.inf:
            raise UserError(f"--below-unigram must be above 0 and finite, got {self.below_unigram}")
        if not 0 <= self.below_margin < math.inf:
            raise UserError(f"--below-margin must be 0 or more and finite, got {self.below_margin}")
        if self.below_margin and not self.below:
            raise UserError(f"--below-margin {self.below_margin} needs --below")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(ReportConfig, report, argv)


def report(config: ReportConfig) -> int:
    """The whole tool; its exit status. Raises UserError."""
    if config.output is not None:
        refuse_present("--output", config.output, [Path(config.output)], config.overwrite)
    runs = named_runs(config.run)
    pairs = named_pairs(config.below, [name for name, _ in runs])
    curves = [read_curve(name, path) for name, path in runs]
    unigram = None if config.unigram_of is None else unigram_entropy(config.unigram_of)
    print(chart(curves, config.x, unigram))
    print()
    print(table(curves, unigram))
    if config.output is not None:
        write_picture(config.output, config.overwrite, lambda output: draw(curves, config.x, unigram, output))
        print(f"\nwrote {config.output}")
    good = True
    if config.below_unigram is not None:
        assert unigram is not None
        good = require_below_unigram(curves, config.below_unigram, unigram)
    of = {curve.name: curve for curve in curves}
    for name, other in pairs:
        good &= require_below(of[name], of[other], config.below_margin)
    return 0 if good else 1


def write_picture(output: str, overwrite: bool, draw_to: Callable[[Path], None]) -> None:
    """Have the picture drawn by the only process that does. Raises UserError."""
    try:
        with sole_writer("--output", output):
            refuse_present("--output", output, [Path(output)], overwrite)
            draw_to(Path(output))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error


def named_runs(words: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FILE words taken apart. UserError where two runs share a name."""
    runs = []
    for word in words:
        name, equals, file = word.rpartition("=")
        path = Path(file)
        runs.append((name if equals else path.resolve().parent.name, path))
    names = [name for name, _ in runs]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"--run needs a different name for each run, got {', '.join(map(repr, names))}; write NAME=FILE")
    return runs


def named_pairs(words: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """NAME:OTHER words taken apart. UserError where one is not two of the runs."""
    pairs = [(name, other) for name in names for other in names if name != other]
    found = {f"{name}:{other}": (name, other) for name, other in pairs}
    for word in words:
        if word not in found:
            raise UserError(f"--below {word} is not NAME:OTHER of two runs; there are {', '.join(names)}")
    return [found[word] for word in words]


def unigram_entropy(prefix: str) -> float:
    """Entropy, in nats, of the frequencies of a dataset's tokens. Raises UserError where it cannot be opened."""
    file = TokenFile.open(prefix, "--unigram-of")
    tokens = np.memmap(f"{prefix}.bin", file.dtype, mode="r", shape=(file.num_tokens,))
    counts = np.zeros(0, np.int64)
    for start in range(0, file.num_tokens, BLOCK):
        block = np.bincount(tokens[start : start + BLOCK], minlength=len(counts))
        block[: len(counts)] += counts
        counts = block
    shares = counts[counts > 0] / file.num_tokens
    return float(-(shares * np.log(shares)).sum())


def require_below_unigram(curves: Sequence[Curve], share: float, unigram: float) -> bool:
    """Say whether every run's last held-out loss is at most `share` of the unigram entropy."""
    verdicts = []
    for curve in curves:
        loss = curve.final
        verdicts.append(loss is not None and loss <= share * unigram)
        told = "is missing (--eval-iters)" if loss is None else f"is {loss / unigram:.2f} of the unigram entropy"
        print(f"{'ok' if verdicts[-1] else 'FAILED'}: held-out loss of {curve.name} {told}, at most {share:.2f} asked for")
    return all(verdicts)


def require_below(curve: Curve, other: Curve, margin: float) -> bool:
    """Print whether one run's last held-out loss is below another's plus `margin`, and the step at which it passed the other's."""
    if curve.final is None or other.final is None:
        print(f"FAILED: {curve.name if curve.final is None else other.name} has no held-out loss (--eval-iters)")
        return False
    good = curve.final < other.final + margin
    allowed = f" ({margin:g} above it is allowed)" if margin else ""
    print(
        f"{'ok' if good else 'FAILED'}: held-out loss of {curve.name} is {curve.final:.4f}, {abs(other.final - curve.final):.4f} "
        f"{'below' if curve.final < other.final else 'not below'} {other.name}'s {other.final:.4f}{allowed}",
        end="",
    )
    passed = min((step for step, loss in curve.held_out.items() if loss < other.final), default=None)
    print(f", which it passed by step {passed} of {curve.steps[-1]}" if passed is not None else "")
    return good


# --- on the terminal --------------------------------------------------------------------------------------------------


def table(curves: Sequence[Curve], unigram: float | None) -> str:
    """One row a run. Training loss: mean of the last twentieth; tokens/s and time: of steps, without evaluations and saves.

    Time is the wall clock's, of a machine that may be shared: the median step suffers least from what else ran there.
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
    """What does not fit into the table."""
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
    """Training losses in characters: a mark a run, `-` for the unigram entropy."""
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
    """Mean loss in each of WIDTH slices of [0, right]; nan where none falls."""
    where = np.minimum((curve.axis(x) / right * WIDTH).astype(int), WIDTH - 1)
    finite = np.isfinite(curve.losses)
    sums = np.bincount(where[finite], curve.losses[finite], WIDTH)
    counts = np.bincount(where[finite], minlength=WIDTH)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(curves: Sequence[Curve], x: Axis, unigram: float | None, output: Path) -> None:
    """Training loss (thin as it was, thick smoothed), held-out loss (marks) and switch to stage 2 (vertical line) of every run. The
    file appears whole or not at all."""
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
        with whole_file(output) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def _when(curve: Curve, x: Axis, step: int) -> float:
    """Where a step stands on the axis."""
    return float(curve.axis(x)[min(int(np.searchsorted(curve.steps, step)), len(curve.steps) - 1)])


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last up to `window` finite losses at each step: float64 [n] -> [n]; nan where there is none."""
    finite = np.isfinite(losses)
    sums = np.cumsum(np.where(finite, losses, 0.0))
    counts = np.cumsum(finite)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
