"""Compare runs by their JSONL logs: a table and a loss curve on the terminal, and a picture.

    python tools/report.py --run plain=runs/a/train.jsonl salt=runs/b/train.jsonl --output loss.png \\
        --unigram-of data/held_out_text_document

The unigram entropy of the held-out tokens is the loss of the best model that knows token frequencies but no context. A language model
must get below it. For a run with a teacher, the training loss shown is the cross entropy with the data, which can be compared between
runs, and not the mixture that stage 1 minimises. A vertical line marks the switch to stage 2.
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
from megatron_salt.files import refuse_present, sole_writer
from megatron_salt.metrics.figures import MARKS, chart, draw, table
from megatron_salt.metrics.history import Axis, Curve, read_curve

BLOCK = 1 << 22


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs by their logs."""

    run: tuple[str, ...]
    """NAME=FILE, one or several: a name for the run and its JSONL log (SAVE/train.jsonl). For FILE alone the directory is the name."""

    output: str | None = None
    """PNG file to write. Default: none."""

    overwrite: bool = False
    """Replace an existing picture."""

    x: Axis = "steps"
    """Horizontal axis: steps, tokens read, or seconds of training."""

    unigram_of: str | None = None
    """Prefix of a dataset (.bin/.idx), usually the held-out one. Its unigram entropy is printed, and drawn as a line."""

    below_unigram: float | None = None
    """Exit with status 1 unless the last held-out loss of every run is at most this share of the unigram entropy."""

    below: tuple[str, ...] = ()
    """NAME:OTHER, one or several pairs of runs. Exit with status 1 unless the last held-out loss of NAME is below that of OTHER."""

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
    """Print the comparison and draw the picture. Returns the exit status: 1 if a required comparison fails. Raises UserError."""
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
    by_name = {curve.name: curve for curve in curves}
    for name, other in pairs:
        good &= require_below(by_name[name], by_name[other], config.below_margin)
    return 0 if good else 1


def write_picture(output: str, overwrite: bool, draw_to: Callable[[Path], None]) -> None:
    """Draw the picture while no other process writes it. Raises UserError."""
    try:
        with sole_writer("--output", output):
            refuse_present("--output", output, [Path(output)], overwrite)
            draw_to(Path(output))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error


def named_runs(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Split NAME=FILE words. Raises UserError if two runs have the same name."""
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
    """Split NAME:OTHER words. Raises UserError if one does not name two of the runs."""
    pairs = [(name, other) for name in names for other in names if name != other]
    by_word = {f"{name}:{other}": (name, other) for name, other in pairs}
    for word in words:
        if word not in by_word:
            raise UserError(f"--below {word} is not NAME:OTHER of two runs; there are {', '.join(names)}")
    return [by_word[word] for word in words]


def unigram_entropy(prefix: str) -> float:
    """Entropy in nats of the token frequencies of a dataset. Raises UserError if it cannot be opened."""
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
    """Print whether the last held-out loss of each run is at most `share` of the unigram entropy. Returns whether all are."""
    verdicts = []
    for curve in curves:
        loss = curve.final
        verdicts.append(loss is not None and loss <= share * unigram)
        position = "is missing (--eval-iters)" if loss is None else f"is {loss / unigram:.2f} of the unigram entropy"
        print(f"{'ok' if verdicts[-1] else 'FAILED'}: held-out loss of {curve.name} {position}, at most {share:.2f} asked for")
    return all(verdicts)


def require_below(curve: Curve, other: Curve, margin: float) -> bool:
    """Print whether the last held-out loss of `curve` is below that of `other` plus `margin`, and when it passed it. Returns whether."""
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
