"""Progress of a long pass: lines in a log, a bar on a terminal, a summary at the end."""

from __future__ import annotations

import sys
from io import StringIO

import pytest

from megatron_salt.metrics import progress_bar
from megatron_salt.metrics.progress_bar import ProgressBar


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def frozen(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: seconds)


def test_a_line_tells_counts_rates_share_and_time_left(monkeypatch, capsys) -> None:
    frozen(monkeypatch, 100.0)
    progress = ProgressBar(("documents", "MB", "tokens"), total=1000, done=200, unit="B", log_interval=10, label="x: ")
    frozen(monkeypatch, 110.0)
    progress.add(600, (20, 1.5, 4000))
    told = "x: 20 documents, 1.5 MB, 4000 tokens; 2.00 documents/s, 0.15 MB/s, 400 tokens/s; 60% done, 00:10 left\n"
    assert capsys.readouterr().out == told
    assert progress.close() == "20 documents, 1.5 MB, 4000 tokens in 10.0 s, 2.00 documents/s, 0.15 MB/s, 400 tokens/s"


@pytest.mark.parametrize("interval, lines", [(1, 6), (2, 3), (4, 1), (7, 0)])
def test_a_line_comes_each_time_the_first_count_passes_the_interval(capsys, interval: int, lines: int) -> None:
    progress = ProgressBar(("blocks",), total=6, unit=" blocks", log_interval=interval)
    for done in range(1, 7):
        progress.add(done, (1,))
    assert progress.done == 6 and len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize("total, done", [(0, 50), (100, 0)])
def test_without_a_total_or_a_step_forward_no_time_is_told(capsys, total: int, done: int) -> None:
    ProgressBar(("documents",), total=total, unit="B", log_interval=1).add(done, (1,))
    assert "left" not in capsys.readouterr().out


@pytest.mark.parametrize("total", [0, 10])
def test_a_terminal_sees_a_bar_and_no_lines(monkeypatch, capsys, total: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = ProgressBar(("blocks", "tokens"), total=total, done=2, unit=" blocks", log_interval=1, label="shard 0/1: ")
    for done in range(3, 11):
        progress.add(done, (1, 100))
    assert progress.close().startswith("8 blocks, 800 tokens in ")
    shown = terminal.getvalue()
    assert "shard 0/1: " in shown and "tokens/s" in shown and capsys.readouterr().out == ""
    if total:
        assert "100%" in shown and "10 of 10 blocks" in shown and "left" in shown
