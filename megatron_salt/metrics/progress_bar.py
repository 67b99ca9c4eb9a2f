"""Progress of a long pass: a bar on a terminal, else a line now and then, and a summary at the end.

The bar goes to stderr, the lines to stdout, so a log file holds lines only. Both show counts, rates and the time left.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm


class ProgressBar:
    """Adds up what a pass has done and shows it."""

    def __init__(
        self, counted: Sequence[str], *, total: int, done: int = 0, unit: str, log_interval: int, label: str = ""
    ) -> None:
        """counted: names of the counts, for example documents, MB and tokens. total: length of the pass, 0 if unknown.
        done: where the pass begins, if an earlier process did a part. unit: of `total` and `done`; "B" means bytes.
        log_interval: a line each time the first count passes a multiple of it. label: begins each line."""
        self.done = done
        self._names, self._counts = tuple(counted), [0.0] * len(counted)
        self._total, self._begin = total, done
        self._interval, self._label = log_interval, label
        self._started = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total or None,
                initial=done,
                unit=unit,
                unit_scale=unit == "B",
                ncols=shutil.get_terminal_size((120, 24)).columns,
                nrows=24,  # a pseudo-terminal may have the size 0
                bar_format=label + "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}{unit}{postfix}, {remaining} left",
            )

    def add(self, done: int, counts: Sequence[float]) -> None:
        """done: where the pass is now. counts: what came since the last call, one number for each name."""
        before = self._counts[0]
        self._counts = [count + more for count, more in zip(self._counts, counts, strict=True)]
        self.done = done
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._counts[0] // self._interval > before // self._interval:
            print(f"{self._label}{self._amounts()}; {self._rates()}{self._left()}", flush=True)

    def close(self) -> str:
        """Finish the bar. Returns the counts, the seconds and the rates as one line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        return f"{self._amounts()} in {self._seconds():.1f} s, {self._rates()}"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)

    def _amounts(self) -> str:
        return ", ".join(
            f"{count:.1f} {name}" if name == "MB" else f"{count:.0f} {name}"
            for name, count in zip(self._names, self._counts, strict=True)
        )

    def _rates(self) -> str:
        rates = [count / self._seconds() for count in self._counts]
        return ", ".join(
            f"{rate:.2f} {name}/s" if rate < 100 else f"{rate:.0f} {name}/s"
            for name, rate in zip(self._names, rates, strict=True)
        )

    def _left(self) -> str:
        if not self._total or self.done <= self._begin:
            return ""
        seconds = self._seconds() * (self._total - self.done) / (self.done - self._begin)
        return f"; {self.done / self._total:.0%} done, {tqdm.format_interval(seconds)} left"
