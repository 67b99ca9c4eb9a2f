"""Jobs of a few milliseconds: Python programs without ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megatron_salt.study.job import Job


def job(base: Path, name: str, program: str = "", needs: tuple[str, ...] = (), steps: int = 0, arm: str = "") -> Job:
    """A job that appends its name to BASE/began and then runs `program`, with `base` and `name` as names."""
    words = f"import os, sys, time, pathlib\nbase, name = pathlib.Path({str(base)!r}), {name!r}\n"
    words += "with open(base / 'began', 'a') as file: file.write(name + '\\n')\n"
    return Job(
        name=name, kind="run" if arm else "select", command=("-c", words + program), ranks=0, directory=base / name, needs=needs,
        steps=steps, arm=arm,
    )  # fmt: skip


def began(base: Path) -> list[str]:
    """Names of the jobs that have begun, in that order."""
    return (base / "began").read_text().split() if (base / "began").exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
