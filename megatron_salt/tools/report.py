"""Compare runs by their JSONL logs: tables and a loss curve on the terminal, a picture, and a page for a browser.

    python tools/report.py --run plain=runs/a/train.jsonl plain=runs/b/train.jsonl salt=runs/c/train.jsonl \\
        --x flops --y valid/prose/bits_per_byte --output loss.png --html runs.html

Runs of one name are the seeds of one arm: their mean is drawn, with a band from the lowest to the highest. For every pair of arms it says
when one passed the other's final figure.

The unigram entropy of the held-out tokens is the loss of the best model that knows token frequencies but no context. A language model
must get below it. For a run with a teacher, the training loss shown is the cross entropy with the data, which can be compared between
runs, and not the mixture that stage 1 minimises. A vertical line marks the switch to stage 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.cli import run_tool
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.errors import UserError
from megatron_salt.files import real_path, refuse_directory, refuse_present, sole_writer, whole_files
from megatron_salt.metrics.arms import Arm, arms_of, finals, passings
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.metrics.figures import Panel, chart, draw, in_columns, lines_of, table
from megatron_salt.metrics.history import Axis, Curve, read_curve
from megatron_salt.metrics.page import write_page
from megatron_salt.metrics.sinks import require_package

BLOCK = 1 << 22


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs by their logs."""

    run: tuple[str, ...]
    """NAME=FILE, one or several: a name for the run and its JSONL log (SAVE/train.jsonl). For FILE alone the directory is the name.
    Runs with the same NAME are seeds of one arm: their mean is shown, and the band from the lowest to the highest."""

    output: str | None = None
    """PNG file to write. Default: none."""

    html: str | None = None
    """HTML page to write, which needs no network. Needs the plotly package. Default: none."""

    overwrite: bool = False
    """Replace an existing picture or page."""

    x: Axis = "steps"
    """Horizontal axis: steps, tokens read, seconds of training, or FLOPs of student and teacher."""

    y: tuple[str, ...] = ()
    """Figures to show, such as valid/prose/bits_per_byte or train/grad_norm; each has a plot of its own.
    The first one decides who has passed whom. Default: the training loss and all held-out losses in one plot."""

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
    """Print the comparison, draw the picture, write the page. Returns the exit status: 1 if a required comparison fails.

    Raises UserError."""
    files = [(flag, Path(path)) for flag, path in (("--output", config.output), ("--html", config.html)) if path is not None]
    for flag, path in files:
        refuse_directory(flag, path)
        refuse_present(flag, str(path), [path], config.overwrite)
    if len({real_path(path) for _, path in files}) < len(files):
        raise UserError(f"--output and --html both name {config.output}")
    if config.html is not None:
        require_package("plotly", "--html")
    runs = named_runs(config.run)
    pairs = named_pairs(config.below, list(dict.fromkeys(name for name, _ in runs)))
    arms = arms_of([(name, read_curve(name, path)) for name, path in runs])
    curves = [curve for arm in arms for curve in arm.curves]
    unigram = None if config.unigram_of is None else unigram_entropy(config.unigram_of)
    panels = panels_of(arms, config.y)
    for panel in panels:
        lines_of(arms, panel, config.x)  # refuses what a log lacks before anything is printed
    print(chart(curves, config.x, unigram))
    print()
    print(table(curves, unigram))
    compared = compared_figure(arms, config.y)
    passed = [] if compared is None else passings(arms, compared)
    if config.y or len(arms) < len(curves):
        figures = list(config.y) or ([] if compared is None else [compared])
        print(f"\n{in_columns(('arm', 'seeds', *figures), finals(arms, figures))}")
    for one in passed:
        print(one)
    writers: dict[str, Callable[[Path], None]] = {
        "--output": lambda output: draw(arms, panels, config.x, unigram, output),
        "--html": lambda output: write_page(arms, panels, passed, config.x, unigram, output),
    }
    write_new([(flag, path, writers[flag]) for flag, path in files], config.overwrite)
    for _, path in files:
        print(f"\nwrote {path}")
    good = True
    if config.below_unigram is not None:
        assert unigram is not None
        good = require_below_unigram(curves, config.below_unigram, unigram)
    by_name = {arm.name: arm for arm in arms}
    for name, other in pairs:
        good &= require_below(by_name[name], by_name[other], config.below_margin)
    return 0 if good else 1


def panels_of(arms: Sequence[Arm], y: Sequence[str]) -> list[Panel]:
    """The plots: one for each figure of --y; without it, one for the training loss and the held-out losses that all arms have."""
    if y:
        return [(figure,) for figure in y]
    shared = [name for name in arms[0].curves[0].of_evaluations if _all_have(arms, name)]
    return [("train/loss", *(name for name in shared if name.endswith("/loss")))]


def compared_figure(arms: Sequence[Arm], y: Sequence[str]) -> str | None:
    """The figure by which arms are compared: the first of --y, else the first held-out loss; None where one of them has none."""
    if y:
        return y[0]
    return next((name for name in panels_of(arms, ())[0] if name != "train/loss"), None)


def _all_have(arms: Sequence[Arm], figure: str) -> bool:
    return all(figure in curve.of_evaluations for arm in arms for curve in arm.curves)


def write_new(outputs: Sequence[tuple[str, Path, Callable[[Path], None]]], overwrite: bool) -> None:
    """Write all files, or none, while no other process writes one of them. outputs: (flag, file, what writes it). Raises UserError."""
    with ExitStack() as held:
        for flag, path, _ in outputs:
            with _telling(f"{flag} {path}"):
                held.enter_context(sole_writer(flag, str(path)))
            refuse_present(flag, str(path), [path], overwrite)
        with (
            _telling(" and ".join(f"{flag} {path}" for flag, path, _ in outputs)),
            whole_files([path for _, path, _ in outputs]) as temporary,
        ):
            for (flag, path, write), file in zip(outputs, temporary, strict=True):
                with _telling(f"{flag} {path}"):
                    write(file)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error


def named_runs(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Split NAME=FILE words. Raises UserError where a file is named twice, or where two directories give the same name."""
    runs, given = [], []
    for word in words:
        name, equals, file = word.rpartition("=")
        path = Path(file)
        runs.append((name if equals else real_path(path).parent.name, path))
        given.append(bool(equals))
    names = [name for name, _ in runs]
    if "" in names or any(names.count(name) > 1 for name, named in zip(names, given, strict=True) if not named):
        raise UserError(f"--run needs a name for each run, got {', '.join(map(repr, names))}; write NAME=FILE")
    files = [real_path(path) for _, path in runs]
    for (_, path), resolved in zip(runs, files, strict=True):
        if files.count(resolved) > 1:
            raise UserError(f"--run names {path} twice; each run has a log of its own")
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


def require_below(arm: Arm, other: Arm, margin: float) -> bool:
    """Print whether the last held-out loss of `arm` is below that of `other` plus `margin`, and when it passed it. Returns whether.

    Of an arm with several seeds the mean counts."""
    names = {
        next((name for name in curve.of_evaluations if name.endswith("/loss")), None) for curve in (*arm.curves, *other.curves)
    }
    figure = next(iter(names)) if len(names) == 1 else None
    if figure is None:
        missing = next((one for one in (arm, other) if any(curve.final is None for curve in one.curves)), None)
        if missing is None:
            print(f"FAILED: {arm.name} and {other.name} have no held-out set in common")
        else:
            print(f"FAILED: {missing.name} has no held-out loss (--eval-iters)")
        return False
    own, others = arm.band(figure), other.band(figure)
    final, target = float(own.mean[-1]), float(others.mean[-1])
    good = final < target + margin
    allowed = f" ({margin:g} above it is allowed)" if margin else ""
    print(
        f"{'ok' if good else 'FAILED'}: held-out loss of {arm.name} is {figure_text(final)}, {figure_text(abs(target - final))} "
        f"{'below' if final < target else 'not below'} {other.name}'s {figure_text(target)}{allowed}",
        end="",
    )
    passed = own.steps[own.mean < target]
    print(f", which it passed by step {passed[0]} of {arm.last_common_step()}" if len(passed) else "")
    return good
