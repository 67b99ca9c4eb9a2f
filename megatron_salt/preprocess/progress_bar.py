"""How far a long pass over files is: a progress bar on a terminal, else a line every so many documents, and a last line."""

from __future__ import annotations

import shutil
import sys
import time

from tqdm import tqdm


class Meter:
    """Counts what is done and shows it: MB/s of text, documents/s, tokens/s, and by the share of the input on disk the time left."""

    def __init__(self, total: int, done: int, log_interval: int) -> None:
        """total, done: bytes of input on disk, all of them and those of an earlier run; total 0: not known.
        log_interval: documents between lines."""
        self.documents = self.text_bytes = self.tokens = 0
        self._total, self._before, self._interval = total, done, log_interval
        self._started = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total or None,
                initial=done,
                unit="B",
                unit_scale=True,
                ncols=shutil.get_terminal_size((120, 24)).columns,
                nrows=24,  # a pseudo-terminal may have the size 0
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}{postfix}, {remaining} left",
            )

    def add(self, documents: int, text_bytes: int, tokens: int, on_disk: int) -> None:
        """on_disk: bytes of the input, on disk, that are done now."""
        before, self.documents = self.documents, self.documents + documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._speeds(), refresh=False)
            self._bar.update(on_disk - self._bar.n)
        elif self.documents // self._interval > before // self._interval:
            print(
                f"{self.documents} documents, {self.text_bytes / 1e6:.1f} MB, {self.tokens} tokens; {self._speeds()}"
                f"{self._left(on_disk)}",
                flush=True,
            )

    def close(self) -> str:
        """Take the bar away; what was done, at what speed."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        return f"{self.documents} documents, {self.text_bytes / 1e6:.1f} MB in {self._seconds():.1f} s, {self._speeds()}"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-6)

    def _speeds(self) -> str:
        seconds = self._seconds()
        return (
            f"{self.text_bytes / 1e6 / seconds:.2f} MB/s, {self.documents / seconds:.0f} documents/s, "
            f"{self.tokens / seconds:.0f} tokens/s"
        )

    def _left(self, on_disk: int) -> str:
        if not self._total or on_disk <= self._before:
            return ""
        left = self._seconds() * (self._total - on_disk) / (on_disk - self._before)
        return f"; {on_disk / self._total:.0%} of the input, {left:.0f} s left"
