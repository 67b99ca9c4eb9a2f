"""Flags of the benchmarks: each one begins, and those of one head refuse sizes that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import head_roofline, kd_loss

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, path
"""


@pytest.mark.long
def test_every_benchmark_says_what_it_does() -> None:
    paths = sorted(str(path) for path in FOLDER.glob("*.py") if "parse_args" in path.read_text())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{PROGRAM}", *paths],
        cwd=FOLDER.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(paths) > 5


@pytest.mark.parametrize(
    "flag",
    ["--tokens 0", "--tokens -5", "--pairs 0", "--threads 0", "--vocabularies 0", "--temperature 0", "--temperature nan"],
)
def test_kd_loss_refuses_what_is_no_size(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kd_loss.main(flag.split())
    assert ended.value.code == 2 and f"argument {flag.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--tflops nan", "--tflops inf", "--gb-per-s 0", "--chunks 0"])
def test_head_roofline_refuses_what_is_no_rate(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["head_roofline.py", *flag.split()])
    with pytest.raises(SystemExit) as ended:
        head_roofline.main()
    assert ended.value.code == 2 and f"argument {flag.split()[0]}: " in capsys.readouterr().err
