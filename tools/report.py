"""What runs came to, from their JSONL logs: a table and a curve of the loss on the terminal, and a picture.

    python tools/report.py --run plain=runs/a/train.jsonl salt=runs/b/train.jsonl --output loss.png \\
        --unigram-of data/held_out_text_document

The unigram entropy of held-out tokens is the loss of the best model that knows how often each token occurs there and nothing
of context: what a language model has to get below.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_salt.cli import run_tool
from megatron_salt.data.windows import TokenFile
from megatron_salt.errors import UserError

MARKS = "*o+x#@"
WIDTH, HEIGHT = 72, 14
BLOCK = 1 << 22

Axis = Literal["steps", "tokens", "seconds"]


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs by their logs."""

    run: tuple[str, ...]
    """NAME=FILE, one or several: what to call a run, and its JSONL (SAVE/train.jsonl). FILE alone is called by its directory."""

    output: str | None = None
    """PNG to write; default: none."""

    x: Axis = "steps"
    """What the loss is drawn against: steps, tokens read, or seconds of training."""

    unigram_of: str | None = None
    """Dataset prefix (.bin/.idx), the held-out one usually, whose unigram entropy is printed and drawn as a line."""

    below_unigram: float | None = None
    """Fail, with status 1, unless the last held-out loss of every run is at most this share of the unigram entropy."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("--run names no run; give NAME=FILE")
        if len(self.run) > len(MARKS):
            raise UserError(f"--run takes up to {len(MARKS)} runs, got {len(self.run)}")
        if self.below_unigram is not None and self.unigram_of is None:
            raise UserError(f"--below-unigram {self.below_unigram} needs --unigram-of")
        if self.below_unigram is not None and not 0 < self.below_unigram < math.inf:
            raise UserError(f"--below-unigram must be above 0 and finite, got {self.below_unigram}")


@dataclass(frozen=True)
class Curve:
    """One run, as its log tells it. Losses are nats a token; a step without a finite loss is nan."""

    name: str
    steps: np.ndarray
    """int64 [n], rising"""
    losses: np.ndarray
    """float64 [n], training"""
    tokens: np.ndarray
    """int64 [n], read since the log began"""
    seconds: np.ndarray
    """float64 [n], of steps alone, since the log began"""
    held_out: dict[int, float]
    """{step: held-out loss}"""
    unread_lines: int
    """Lines that are not JSON: a crash tears at most the last one."""

    def axis(self, x: Axis) -> np.ndarray:
        """Where each step stands on the chosen axis: [n]."""
        return {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}[x]


def report(config: ReportConfig) -> int:
    """The whole tool; its exit status. Raises UserError."""
    curves = [read_curve(name, path) for name, path in named_runs(config.run)]
    unigram = None if config.unigram_of is None else unigram_entropy(config.unigram_of)
    print(chart(curves, config.x, unigram))
    print()
    print(table(curves, unigram))
    if config.output is not None:
        draw(curves, config.x, unigram, Path(config.output))
        print(f"\nwrote {config.output}")
    if config.below_unigram is None:
        return 0
    assert unigram is not None
    return require_below(curves, config.below_unigram, unigram)


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


def read_curve(name: str, path: Path) -> Curve:
    """A run's JSONL. UserError where the file cannot be read or no step is in it."""
    entries, unread = _entries(path)
    steps = {entry["step"]: entry for entry in entries if entry["kind"] == "step"}  # of a step told twice, the later
    if not steps:
        raise UserError(f"--run {name}={path} is not the log of a run: no line in it is a step")
    try:
        rows = [steps[step] for step in sorted(steps)]
        return Curve(
            name=name,
            steps=np.array([row["step"] for row in rows], np.int64),
            losses=np.array([np.nan if row["loss"] is None else row["loss"] for row in rows], np.float64),
            tokens=np.cumsum([row["tokens"] for row in rows], dtype=np.int64),
            seconds=np.cumsum([row["seconds"] for row in rows], dtype=np.float64),
            held_out={entry["step"]: entry["loss"] for entry in entries if entry["kind"] == "eval" and entry["loss"] is not None},
            unread_lines=unread,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--run {name}={path} is not the log of a run: an entry lacks or garbles {error}") from error


def _entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    entries, unread = [], 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--run {path} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            unread += 1
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry:
            entries.append(entry)
    return entries, unread


def unigram_entropy(prefix: str) -> float:
    """Entropy, in nats, of the frequencies of a dataset's tokens. Raises UserError where it cannot be opened."""
    file = TokenFile.open(prefix, "--unigram-of")
    tokens = np.memmap(f"{prefix}.bin", file.dtype, mode="r", shape=(file.num_tokens,))
    counts = np.zeros(0, np.int64)
    for start in range(0, file.num_tokens, BLOCK):
        block = np.bincount(tokens[start:start + BLOCK], minlength=len(counts))
        block[:len(counts)] += counts
        counts = block
    shares = counts[counts > 0] / file.num_tokens
    return float(-(shares * np.log(shares)).sum())


def require_below(curves: Sequence[Curve], share: float, unigram: float) -> int:
    """Say whether every run's last held-out loss is at most `share` of the unigram entropy; 0 or 1."""
    status = 0
    for curve in curves:
        if not curve.held_out:
            print(f"FAILED: {curve.name} has no held-out loss (--eval-iters)")
            status = 1
            continue
        loss = curve.held_out[max(curve.held_out)]
        good = loss <= share * unigram
        print(f"{'ok' if good else 'FAILED'}: held-out loss of {curve.name} is {loss / unigram:.2f} of the unigram entropy, "
              f"at most {share:.2f} asked for")
        status = status if good else 1
    return status


# --- on the terminal --------------------------------------------------------------------------------------------------

def table(curves: Sequence[Curve], unigram: float | None) -> str:
    """One row a run. Training loss: mean of the last twentieth; tokens/s and time: of steps, without evaluations and saves."""
    heads = ["run", "steps", "tokens", "training loss", "held-out loss", "unigram entropy", "tokens/s", "time"]
    rows = []
    for curve in curves:
        last = curve.losses[-max(1, len(curve.losses) // 20):]
        loss = f"{np.nanmean(last):.4f}" if np.isfinite(last).any() else "nan"
        held_out = f"{curve.held_out[max(curve.held_out)]:.4f}" if curve.held_out else "-"
        seconds, tokens = curve.seconds[-1], int(curve.tokens[-1])
        rows.append([curve.name, str(curve.steps[-1]), str(tokens), loss, held_out, "-" if unigram is None else f"{unigram:.4f}",
                     f"{tokens / max(seconds, 1e-9):.0f}", f"{seconds:.1f} s"])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in [heads, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    unread = [f"{curve.name}: {curve.unread_lines} lines of its log could not be read" for curve in curves if curve.unread_lines]
    return "\n".join(lines + unread)


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
    """Training loss (thin as it was, thick smoothed) and held-out loss (marks) of every run. The file appears whole or not at all."""
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
            places = at[np.searchsorted(curve.steps, evaluated)]
            axes.plot(places, [curve.held_out[step] for step in evaluated], "o--", color=colour, markersize=5, linewidth=1,
                      label=f"{curve.name}, held-out")
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle=":", label="unigram entropy of held-out tokens")
    axes.set_xlabel({"steps": "steps", "tokens": "tokens", "seconds": "seconds of training"}[x])
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    tmp = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(tmp, format="png", dpi=120)
        os.replace(tmp, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last up to `window` finite losses at each step: float64 [n] -> [n]; nan where there is none."""
    finite = np.isfinite(losses)
    sums = np.cumsum(np.where(finite, losses, 0.0))
    counts = np.cumsum(finite)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


if __name__ == "__main__":
    raise SystemExit(run_tool(ReportConfig, report))
